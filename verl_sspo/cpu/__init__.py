"""verl without an accelerator: the platform `cpu`."""


def register() -> None:
    """Registers the platform `cpu` with verl, which chooses it if no other platform is available.

    verl's own variable `VERL_PLATFORM` overrides the choice: `cpu` uses the CPU even if there is a GPU, `nvidia` keeps
    a process without a GPU (for example on the head node of a cluster) off this platform.
    """
    from verl.plugin.platform import PlatformRegistry

    from verl_sspo.cpu.platform import PlatformCPU

    PlatformRegistry.register("cpu")(PlatformCPU)
