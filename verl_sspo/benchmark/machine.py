"""Where it was measured: what a reader needs to judge the figures."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import psutil
import torch

# Load average of the last minute before anything was measured: the machine should have had nothing else to do.
LOAD = "load at the start"
PACKAGES = ("verl-sspo", "verl", "torch", "transformers", "numpy", "ray")


def describe(device: torch.device) -> dict[str, Any]:
    """Processor, memory, threads, load and versions."""
    described: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "L2 bytes of a core": cache_bytes(2),
        "L3 bytes": cache_bytes(3),
        "memory bytes": psutil.virtual_memory().total,
        LOAD: round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {"gpu": properties.name, "gpu memory bytes": properties.total_memory, "cuda": torch.version.cuda}
    return described | {name: importlib.metadata.version(name) for name in PACKAGES}


def cpu_model() -> str:
    """The name that Linux reports, or else the architecture."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def cache_bytes(level: int) -> int:
    """Size of the cache of that level that the first core sees; 0 where Linux does not tell."""
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        if (index / "level").read_text().strip() == str(level):
            return int((index / "size").read_text().strip().removesuffix("K")) * 1024
    return 0


def own_cache_bytes(device: torch.device) -> int:
    """What can stay close to the arithmetic: L2 of the cores in use, or of the GPU. L3 may be shared with anybody."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return cache_bytes(2) * torch.get_num_threads()


def available_bytes(device: torch.device) -> int:
    """Memory that can be taken now."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
