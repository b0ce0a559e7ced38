"""Memory of a call: the peak of what it allocates, and what autograd keeps for its backward pass."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

# The profiler announces each of its starts and stops otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that `call` held at a time, beyond those that were there before.

    On CUDA the caching allocator's own count. On a CPU PyTorch's profiler records every allocation and release of the
    allocator of tensors, those inside of operators and of the backward pass included, with their running total; scratch
    memory that a library takes without that allocator is not in it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return max((e["args"]["Total Allocated"] for e in events if e["name"] == "[memory]"), default=0)


def saved_bytes(forward: Callable[[], object], inputs: list[torch.Tensor]) -> int:
    """Bytes that autograd keeps from `forward` for the backward pass, the inputs left out: those are there anyway.

    A tensor that is kept twice, or as a view, counts once.
    """
    kept: dict[int, torch.UntypedStorage] = {}  # holding the storages, so that no address is given out twice
    there = {tensor.untyped_storage().data_ptr() for tensor in inputs}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())
