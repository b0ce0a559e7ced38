"""The places where the embedded backend enters verl. Three are verl's registries; what is not is said at each.

Every function checks what it relies on and raises `IncompatibleVerlError` where this verl is built otherwise.
"""

import functools
import inspect
import sys
from importlib.metadata import version
from typing import Any


class IncompatibleVerlError(RuntimeError):
    """The installed verl is not built as the embedded backend expects."""

    def __init__(self, expected: str) -> None:
        super().__init__(
            f"The embedded CPU backend of verl_sspo was written for verl 0.9 and does not fit verl {version('verl')}: "
            f"{expected}. Install a supported verl, or set VERL_PLATFORM to run without the backend."
        )


def _expect(condition: bool, expected: str) -> None:
    if not condition:
        raise IncompatibleVerlError(expected)


def register_platform() -> None:
    """The platform `cpu`, in verl's public registry."""
    from verl.plugin.platform import PlatformRegistry, platform_manager

    from verl_sspo.cpu.platform import PlatformCPU

    chosen = getattr(platform_manager, "_current_platform", None)
    _expect(
        chosen is None or chosen.device_name == "cpu",
        "verl was expected not to choose its platform before its plugins are loaded",
    )
    PlatformRegistry.register("cpu")(PlatformCPU)


def register_rollout() -> None:
    """The rollout `hf`: the servers' side in verl's public registry, the trainers' side in a private dictionary.

    verl has no function for the second. Both load `verl_sspo.cpu.rollout` when it is asked for, not before.
    """
    from verl.workers.rollout import base
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    def load_replica():
        from verl_sspo.cpu.rollout import HFReplica

        return HFReplica

    RolloutReplicaRegistry.register("hf", load_replica)

    registry = getattr(base, "_ROLLOUT_REGISTRY", None)
    _expect(
        isinstance(registry, dict) and isinstance(registry.get(("vllm", "async")), str),
        "verl.workers.rollout.base._ROLLOUT_REGISTRY was expected to map (name, mode) to the name of a class",
    )
    registry["hf", "async"] = "verl_sspo.cpu.rollout.HFServerAdapter"  # type: ignore[index]


def initialize_process_groups_with_gloo() -> None:
    """Default backend "cpu:gloo" for verl's process groups.

    verl asks torch for f"cpu:gloo,{device}:{backend}": on the CPU "cpu:gloo,cpu:gloo", and torch refuses two backends
    for one device. The function takes the backend as an argument, but no caller passes it.
    """
    from verl.utils import distributed

    original: Any = getattr(distributed, "initialize_global_process_group_ray", None)
    _expect(
        callable(original) and "backend" in inspect.signature(original).parameters,
        "verl.utils.distributed.initialize_global_process_group_ray(timeout_second, backend) was expected",
    )
    _expect(
        "verl.workers.engine_workers" not in sys.modules,
        "verl.workers.engine_workers, which holds on to that function, was expected not to be imported this early",
    )

    @functools.wraps(original)
    def initialize_global_process_group_ray(timeout_second: float | None = None, backend: str | None = None) -> None:
        original(timeout_second=timeout_second, backend=backend or "cpu:gloo")

    distributed.initialize_global_process_group_ray = initialize_global_process_group_ray


def save_copies_of_weights() -> None:
    """Makes the weights that `separate_async` keeps of the start of a cycle a copy.

    verl brings them to the CPU by `tensor.cpu()`, which for a tensor on the CPU is the tensor itself: the old policy
    that is restored later would be the present one.
    """
    from verl.utils import fsdp_utils

    original: Any = getattr(fsdp_utils, "fsdp2_sharded_save_to_cpu", None)
    _expect(
        callable(original) and list(inspect.signature(original).parameters) == ["model"],
        "verl.utils.fsdp_utils.fsdp2_sharded_save_to_cpu(model) was expected",
    )

    @functools.wraps(original)
    def fsdp2_sharded_save_to_cpu(model: Any) -> Any:
        saved, global_spec = original(model)
        return {name: (tensor.clone(), spec) for name, (tensor, spec) in saved.items()}, global_spec

    fsdp_utils.fsdp2_sharded_save_to_cpu = fsdp2_sharded_save_to_cpu
