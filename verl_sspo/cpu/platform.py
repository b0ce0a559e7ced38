"""verl's platform for a host without an accelerator."""

import resource
import sys
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry


def _nothing(*args: Any, **kwargs: Any) -> None:
    """A CPU has nothing to do here."""


class Device:
    """The part of `torch.cuda` that verl calls on its device module. Memory is that of this process, in bytes."""

    set_device = synchronize = empty_cache = ipc_collect = reset_peak_memory_stats = staticmethod(_nothing)
    manual_seed = manual_seed_all = staticmethod(torch.manual_seed)
    get_rng_state = staticmethod(torch.get_rng_state)
    set_rng_state = staticmethod(torch.set_rng_state)

    @staticmethod
    def is_available() -> bool:
        """False: there is no accelerator with memory or random state of its own."""
        return False

    @staticmethod
    def device_count() -> int:
        return 0

    @staticmethod
    def current_device() -> str:
        return "cpu"

    @staticmethod
    def get_device_name(device: object = None) -> str:
        return "CPU"

    @staticmethod
    def memory_allocated(device: object = None) -> int:
        return psutil.Process().memory_info().rss

    @staticmethod
    def max_memory_allocated(device: object = None) -> int:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # The kernel updates its record of the peak only now and then.
        return max(peak if sys.platform == "darwin" else peak * 1024, Device.memory_allocated())

    memory_reserved, max_memory_reserved = memory_allocated, max_memory_allocated

    @staticmethod
    def mem_get_info(device: object = None) -> tuple[int, int]:
        """(free, total) of the host's memory."""
        memory = psutil.virtual_memory()
        return memory.available, memory.total


class PlatformCPU(PlatformBase):
    """Tensors on the CPU, collectives through gloo, Ray's `GPU` as a logical resource (`ray.init(num_gpus=...)`)."""

    device_name = vendor_name = "cpu"  # type: ignore[assignment]
    device_module = Device  # type: ignore[assignment]
    set_device = synchronize = set_allocator_settings = empty_cache = _nothing
    profiler_start = profiler_stop = cudart = _nothing

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        """Whether no other registered platform is available: verl takes the first available one, in any order."""
        names = PlatformRegistry.registered_names()
        others = [platform() for name in names if name != "cpu" and (platform := PlatformRegistry.get(name))]
        # With a GPU but without nvidia-smi, no platform is available, and verl takes its default, `nvidia`.
        return not (torch.cuda.is_available() or any(other.is_platform_available(use_smi_check) for other in others))

    def is_available(self) -> bool:
        """True. verl calls this after it has chosen the platform, so this also prepares the rest of verl.

        Raises:
            IncompatibleVerlError: an internal of verl is not as expected.
        """
        from verl_sspo.cpu import internals

        internals.prepare_verl()
        return True

    def current_device(self) -> Any:
        """The device itself: verl calls `tensor.to(current_device())`, and the CPU has no index."""
        return "cpu"

    def device_count(self) -> int:
        return 0

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False

    @contextmanager
    def nvtx_range(self, msg: str):
        yield
