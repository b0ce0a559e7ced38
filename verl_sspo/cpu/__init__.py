"""verl without an accelerator: the `cpu` platform and the rollout engine `hf`, both through verl's own registries.

`register` is called in every verl process, at `import verl`. It imports nothing that makes verl choose its platform,
and where there is an accelerator it does nothing at all.
"""

import logging
import os

logger = logging.getLogger(__name__)


def register() -> bool:
    """Makes verl run on the CPU, if this process has nothing better.

    `VERL_PLATFORM`, verl's own variable, overrides the choice in both directions: `cpu` takes the CPU beside a GPU,
    `nvidia` keeps a process without a GPU (the head node of a cluster, say) out of it.

    Returns:
        Whether the embedded backend was registered.

    Raises:
        IncompatibleVerlError: an internal of verl that the backend has to touch is not as expected.
    """
    if not _is_chosen():
        return False

    # The workers that this process starts inherit the decision.
    os.environ["VERL_PLATFORM"] = "cpu"
    # verl registers its FSDP engines for "cuda" and "npu" and looks them up by the platform's device, unless this
    # variable of its own says which registration to take. The engines themselves run on any device of torch.
    os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")
    # TransferQueue takes eight threads of torch to copy a few kilobytes, and warns at each sample that there are fewer.
    os.environ.setdefault("TQ_NUM_THREADS", "1")

    from verl_sspo.cpu import internals

    internals.register_platform()
    internals.register_rollout()
    internals.initialize_process_groups_with_gloo()
    logger.info("verl_sspo: no accelerator in this process, verl runs on the CPU")
    return True


def _is_chosen() -> bool:
    if chosen := os.environ.get("VERL_PLATFORM", "").strip().lower():
        return chosen == "cpu"

    import torch
    from verl.plugin.platform import PlatformRegistry

    if torch.cuda.is_available():
        return False
    # The question that verl's own detection asks of each platform. It sees the GPUs of a host from a Ray actor that
    # was given none.
    platforms = [PlatformRegistry.get(name) for name in PlatformRegistry.registered_names() if name != "cpu"]
    return not any(platform().is_platform_available(use_smi_check=True) for platform in platforms if platform)
