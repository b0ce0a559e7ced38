"""Registers the rollout `hf` in this process on import.

The platform `cpu` imports this module. On other platforms, verl imports it in each of its processes if
`VERL_USE_EXTERNAL_MODULES` names it, as in recipes/hardware/gpu_hf.yaml.
"""

from importlib.metadata import version
from typing import Any

from verl.workers.rollout import base
from verl.workers.rollout.replica import RolloutReplicaRegistry


class IncompatibleVerlError(RuntimeError):
    """The installed verl or transformers is not built as this package expects."""


def expect(condition: bool, expected: str) -> None:
    """Raises IncompatibleVerlError if `condition` is false. `expected` describes verl's or transformers' internals."""
    if not condition:
        raise IncompatibleVerlError(
            f"verl_sspo's CPU platform and rollout `hf` do not fit verl {version('verl')} with transformers "
            f"{version('transformers')}: they expect {expected}. Install versions that docs/compatibility.md lists, or "
            "set VERL_PLATFORM to run without the CPU platform."
        )


def register_rollout() -> None:
    """Registers the server's side in verl's public registry, and the trainer's side in a private dictionary.

    verl has no function for the second.
    """

    def load_replica():
        from verl_sspo.hf.rollout import HFReplica

        return HFReplica

    RolloutReplicaRegistry.register("hf", load_replica)
    registry: Any = getattr(base, "_ROLLOUT_REGISTRY", None)
    expect(
        isinstance(registry, dict) and isinstance(registry.get(("vllm", "async")), str),
        "verl.workers.rollout.base._ROLLOUT_REGISTRY to map (name, mode) to the name of a class",
    )
    registry["hf", "async"] = "verl_sspo.hf.rollout.HFServerAdapter"


register_rollout()
