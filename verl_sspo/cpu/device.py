"""The part of `torch.cuda` that verl calls on its device module, for the CPU: memory figures are this process's own."""

import resource
import sys

import psutil
import torch


def is_available() -> bool:
    """False: there is no accelerator whose memory or random state would have to be cared for."""
    return False


def device_count() -> int:
    return 0


def current_device() -> str:
    return "cpu"


def set_device(device: object) -> None:
    pass


def get_device_name(device: object = None) -> str:
    return "CPU"


def synchronize(device: object = None) -> None:
    pass


def empty_cache() -> None:
    pass


def ipc_collect() -> None:
    pass


def manual_seed(seed: int) -> None:
    torch.manual_seed(seed)


manual_seed_all = manual_seed
get_rng_state = torch.get_rng_state
set_rng_state = torch.set_rng_state


def memory_allocated(device: object = None) -> int:
    """Bytes of memory that this process holds."""
    return psutil.Process().memory_info().rss


memory_reserved = memory_allocated


def max_memory_allocated(device: object = None) -> int:
    """Bytes that this process held at its peak."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # The kernel brings its record of the peak up to date only now and then.
    return max(peak if sys.platform == "darwin" else peak * 1024, memory_allocated())


max_memory_reserved = max_memory_allocated


def reset_peak_memory_stats(device: object = None) -> None:
    pass


def mem_get_info(device: object = None) -> tuple[int, int]:
    """(free, total) bytes of the host's memory."""
    memory = psutil.virtual_memory()
    return memory.available, memory.total
