"""Times calls side by side: in turns, so that whatever else the machine does hits all of them alike."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

LEAST_ROUNDS, MOST_ROUNDS = 5, 200
WARM_UP_CALLS = 2


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of one call's durations, in seconds, and how many there were."""

    median: float
    q1: float
    q3: float
    rounds: int

    @classmethod
    def of(cls, durations: list[float]) -> "Spread":
        q1, median, q3 = statistics.quantiles(durations, n=4, method="inclusive")
        return cls(median, q1, q3, len(durations))

    def in_ms(self) -> dict[str, float]:
        """As columns of a row: ms, ms_q1, ms_q3, rounds."""
        return {"ms": 1e3 * self.median, "ms_q1": 1e3 * self.q1, "ms_q3": 1e3 * self.q3, "rounds": self.rounds}


def interleave(
    calls: Mapping[str, Callable[[], object]], seconds: float, device: torch.device | None = None
) -> dict[str, Spread]:
    """Times every call once a round, in an order that turns from round to round.

    Right before it is timed a call is made once untimed: after another implementation it would find caches full of that
    one's code and data, and pay for its neighbour in the list.

    Args:
        calls: what to time. Called twice before, to warm up.
        seconds: about how long all rounds may take; they are 5 at least and 200 at most.
        device: where the calls compute; on CUDA, its events are what is timed.
    """
    on_cuda = device is not None and device.type == "cuda"
    time_one = _cuda_seconds if on_cuda else _seconds
    for _ in range(WARM_UP_CALLS):
        round_seconds = 2 * sum(_seconds(call) for call in calls.values())
    rounds = min(max(int(seconds / max(round_seconds, 1e-9)), LEAST_ROUNDS), MOST_ROUNDS)
    names = list(calls)
    durations: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        for i in range(rounds):
            first = i % len(names)
            for name in names[first:] + names[:first]:
                calls[name]()
                durations[name].append(time_one(calls[name]))
    finally:
        if collects:
            gc.enable()
    return {name: Spread.of(values) for name, values in durations.items()}


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cuda_seconds(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3
