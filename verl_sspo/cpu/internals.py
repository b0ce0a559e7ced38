"""The changes that the platform `cpu` makes inside verl and transformers.

Every function checks what it relies on and raises an IncompatibleVerlError if that is built differently.
"""

import functools
import inspect
import logging
import os
import sys
from typing import Any

# Its import registers the rollout `hf`.
from verl_sspo.hf.register import expect
from verl_sspo.hf.threads import use_cores

logger = logging.getLogger(__name__)


@functools.cache
def prepare_verl() -> None:
    """Makes engines and process groups of this process work on the CPU."""
    # verl registers its FSDP engines for "cuda" and "npu" and looks them up by the platform's device, unless this
    # variable of verl names another. The engines themselves run on any device.
    os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")
    initialize_process_groups_with_gloo()
    share_keys_while_decoding()
    logger.info("verl_sspo: no accelerator in this process, verl runs on the CPU")


def initialize_process_groups_with_gloo() -> None:
    """Makes "cpu:gloo" the default backend of verl's process groups, and gives each rank its cores.

    verl asks torch for f"cpu:gloo,{device}:{backend}". On the CPU this is "cpu:gloo,cpu:gloo", and torch rejects two
    backends for one device. verl's function takes the backend as an argument, but no caller passes it.
    """
    from verl.utils import distributed

    name = "initialize_global_process_group_ray"
    original = _function(distributed, name, "timeout_second", "backend")

    @functools.wraps(original)
    def initialize(timeout_second: float | None = None, backend: str | None = None) -> None:
        original(timeout_second=timeout_second, backend=backend or "cpu:gloo")
        use_cores(int(os.environ.get("RAY_LOCAL_WORLD_SIZE", 1)), f"trainer rank {os.environ.get('RANK', 0)}")

    setattr(distributed, name, initialize)
    # The trainer's workers import the function by name, and verl may choose its platform while they do.
    if workers := sys.modules.get("verl.workers.engine_workers"):
        setattr(workers, name, initialize)


def share_keys_while_decoding() -> None:
    """Lets sdpa share keys and values between query heads when there is a mask and one new token per sequence.

    With a mask, transformers repeats them for every query head, because on GPUs sdpa has no fast kernel for both. Its
    CPU kernel supports both. For longer queries sharing is not faster.
    """
    from transformers.integrations import sdpa_attention

    _function(sdpa_attention, "use_gqa_in_sdpa", "attention_mask", "key")

    def use_gqa_in_sdpa(attention_mask: Any, key: Any) -> bool:
        return attention_mask is None or attention_mask.shape[-2] == 1

    sdpa_attention.use_gqa_in_sdpa = use_gqa_in_sdpa


def save_copies_of_weights() -> None:
    """Makes `separate_async` keep a copy of the weights at the start of a cycle.

    verl saves them with `tensor.cpu()`, which for a tensor on the CPU returns the tensor itself. So the old policy that
    is restored later would be the current one.
    """
    from verl.utils import fsdp_utils

    original = _function(fsdp_utils, "fsdp2_sharded_save_to_cpu", "model")

    @functools.wraps(original)
    def fsdp2_sharded_save_to_cpu(model: Any) -> Any:
        saved, global_spec = original(model)
        return {name: (tensor.clone(), spec) for name, (tensor, spec) in saved.items()}, global_spec

    fsdp_utils.fsdp2_sharded_save_to_cpu = fsdp2_sharded_save_to_cpu


def _function(module: Any, name: str, *parameters: str) -> Any:
    function = getattr(module, name, None)
    expect(
        callable(function) and tuple(inspect.signature(function).parameters) == parameters,
        f"{module.__name__}.{name}({', '.join(parameters)})",
    )
    return function
