"""Threads of torch for a process that computes. Ray gives each worker one (OMP_NUM_THREADS=1)."""

import os
from pathlib import Path

import psutil
import torch

# Environment variables. The first: threads per process, fewer than its part of the cores. A model of a few hundred
# thousand parameters is fastest with 1. The second: processes that compute at the same time per trainer rank, 1 unless
# the rollout runs beside the trainer.
THREADS, BUSY_PER_RANK = "VERL_SSPO_THREADS", "VERL_SSPO_BUSY_PER_RANK"


def available_cores() -> int:
    """Physical cores that this process may use: at most its affinity, and its cgroup's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(allowed, psutil.cpu_count(logical=False) or allowed)
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists() and (values := quota.read_text().split())[0] != "max":
        cores = min(cores, int(values[0]) // int(values[1]))
    return max(1, cores)


def use_cores(ranks_per_node: int, process: str) -> None:
    """Gives torch this process's part of the cores, and logs it.

    Args:
        ranks_per_node: processes of this kind on the node.
        process: name for the log.
    """
    busy, cores = ranks_per_node * int(os.environ.get(BUSY_PER_RANK, 1)), available_cores()
    part = max(1, cores // busy)
    torch.set_num_threads(min(part, int(os.environ.get(THREADS, part))))
    # Not logged: verl's log shows warnings only.
    print(f"verl_sspo: {process} computes with {torch.get_num_threads()} threads ({cores} cores, {busy} processes)")
