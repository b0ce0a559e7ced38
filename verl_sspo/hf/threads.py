"""Sets the number of torch's threads in a process. Ray gives each worker one (OMP_NUM_THREADS=1)."""

import os
from pathlib import Path

import psutil
import torch

# Environment variables. THREADS limits the threads per process; a model of a few hundred thousand parameters is fastest
# with 1. BUSY_PER_RANK is the number of processes per trainer rank that compute at the same time: 1 unless the rollout
# runs beside the trainer.
THREADS, BUSY_PER_RANK = "VERL_SSPO_THREADS", "VERL_SSPO_BUSY_PER_RANK"


def available_cores() -> int:
    """Physical cores that this process may use, limited by its affinity and its cgroup's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(allowed, psutil.cpu_count(logical=False) or allowed)
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists() and (values := quota.read_text().split())[0] != "max":
        cores = min(cores, int(values[0]) // int(values[1]))
    return max(1, cores)


def use_cores(ranks_per_node: int, process: str) -> None:
    """Gives torch this process's part of the cores, and prints it.

    Args:
        ranks_per_node: processes of this kind on the node.
        process: name for the log.
    """
    busy, cores = ranks_per_node * int(os.environ.get(BUSY_PER_RANK, 1)), available_cores()
    part = max(1, cores // busy)
    torch.set_num_threads(min(part, int(os.environ.get(THREADS, part))))
    # Printed, not logged: verl's log shows warnings only.
    print(f"verl_sspo: {process} computes with {torch.get_num_threads()} threads ({cores} cores, {busy} processes)")
