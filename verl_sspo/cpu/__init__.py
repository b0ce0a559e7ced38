"""verl without an accelerator: the platform `cpu`."""


def register() -> None:
    """Offers verl the platform `cpu`. verl chooses it later, if no other platform is available.

    `VERL_PLATFORM`, verl's own variable, overrides the choice: `cpu` takes the CPU beside a GPU, `nvidia` keeps a
    process without a GPU (the head node of a cluster, for example) out of it.
    """
    from verl.plugin.platform import PlatformRegistry

    from verl_sspo.cpu.platform import PlatformCPU

    PlatformRegistry.register("cpu")(PlatformCPU)
