"""Time and memory of calls, side by side."""

import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

# Otherwise the profiler logs each start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

LEAST_ROUNDS = 5


class Section(NamedTuple):
    """A table of the report: heading, how it was measured, figures."""

    title: str
    note: str
    table: pd.DataFrame

    def as_markdown(self) -> str:
        figures = self.table.to_markdown(floatfmt=".3g", intfmt=",") if len(self.table) else ""
        return f"## {self.title}\n\n{self.note}\n\n{figures}".strip()


def side_by_side(calls: Mapping[str, Callable[[], object]], seconds: float) -> pd.DataFrame:
    """Times all calls once per round, in random order, so that other load on the machine hits all of them.

    Before each timed call torch's Timer makes the same call twice untimed. Otherwise a call would pay for the caches
    that the one before it filled. On CUDA the timer synchronizes.

    Args:
        calls: what to time, by name.
        seconds: time for all rounds; there are at least 5.

    Returns:
        A row per call: median and quartiles in milliseconds as `ms`, `q1`, `q3`.
    """
    timers = {
        name: Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        for name, call in calls.items()
    }
    times: dict[str, list[float]] = {name: [] for name in timers}
    order = random.Random(0)
    end, rounds = time.monotonic() + seconds, 0
    while rounds < LEAST_ROUNDS or time.monotonic() < end:
        for name in order.sample(list(timers), len(timers)):
            times[name].append(1e3 * timers[name].timeit(1).median)
        rounds += 1
    return pd.DataFrame(times).quantile([0.5, 0.25, 0.75]).T.set_axis(["ms", "q1", "q3"], axis="columns")


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Peak bytes of tensors during `call`, beyond those that existed before.

    On CUDA the caching allocator counts. On a CPU the profiler records each allocation and release of torch's
    allocator, including the backward pass, but not memory that libraries allocate in other ways.
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
    """Bytes that autograd keeps for the backward pass of `forward`, without the inputs; each storage counts once."""
    kept: dict[int, torch.UntypedStorage] = {}  # the storages themselves, so that no address is reused
    there = {tensor.untyped_storage().data_ptr() for tensor in inputs}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())
