"""The figures of one run, from the metrics that verl writes as JSON lines."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

# verl's metrics in the folder of a run, one JSON object per step.
METRICS = "metrics.jsonl"
# The mean slope of the gate, see `verl_sspo.algorithm.metrics`. Other losses do not have it.
EFFECTIVE_UPDATE_RATIO = "actor/sspo/slope"
ENTROPY = "actor/entropy"
REWARD = "critic/score/mean"
SECONDS_PER_STEP = "timing_s/step"


@dataclass(frozen=True)
class Metrics:
    """verl's metrics of one run: step 0 is the validation before training, training steps count from 1."""

    steps: dict[int, dict[str, float]]

    @classmethod
    def read(cls, path: Path) -> "Metrics":
        """Reads a file of verl's logger `file`; a last line that is cut off is left out.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a line in the middle is not JSON, or the file holds no metrics.
        """
        lines = path.read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
        steps: dict[int, dict[str, float]] = {}
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                steps.setdefault(entry["step"], {}).update(entry["data"])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: not a line of verl's file logger") from error
        if not steps:
            raise ValueError(f"{path} holds no metrics: the run ended before its first step")
        return cls(dict(sorted(steps.items())))

    @classmethod
    def read_attempts(cls, folders: Sequence[Path]) -> "Metrics":
        """What several starts of a run have logged, oldest first, as one run.

        From where a start resumes, its steps replace those of the ones before; the validation with which it begins
        joins the step that it resumed from. Starts that have not come to their first step count for nothing.
        """
        steps: dict[int, dict[str, float]] = {}
        for folder in folders:
            try:
                resumed = cls.read(folder / METRICS).steps
            except (FileNotFoundError, ValueError):
                # Killed before, or while, it wrote its first line.
                continue
            first = min(resumed)
            begin = steps.get(first, {}) | resumed[first]
            steps = {step: data for step, data in steps.items() if step < first} | resumed | {first: begin}
        return cls(steps)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps at which `name` was logged with a finite value, and these values; verl writes NaN as null."""
        points = [(step, data[name]) for step, data in self.steps.items() if data.get(name) is not None]
        points = [(step, value) for step, value in points if math.isfinite(value)]
        return [step for step, _ in points], [value for _, value in points]

    @property
    def accuracy(self) -> tuple[list[int], list[float]]:
        """The series of the validation accuracy, `val-core/<data source>/acc/mean@<n>`; of several sources, the first.

        Empty if nothing was validated.
        """
        names = sorted({name for data in self.steps.values() for name in data if name.startswith("val-core/")})
        return self.series(next((name for name in names if "/mean@" in name), names[0])) if names else ([], [])


def summarize(metrics: Metrics, seconds: float) -> dict[str, float | int | None]:
    """The figures of a run.

    Args:
        metrics: of the run.
        seconds: wall time of the whole command.

    Returns:
        accuracy_before, accuracy_after: validation accuracy, first and last; None if nothing was validated.
        entropy_before, entropy_after: mean entropy of the policy's next token on its own responses, nats, at the first
            and the last step.
        effective_update_ratio: slope of the gate averaged over all steps; None for losses that do not log it.
        steps: training steps.
        seconds_per_step: median duration of a step without validation.
        seconds: as given.

    Raises:
        ValueError: nothing was trained.
    """
    accuracy: list[Any] = metrics.accuracy[1] or [None]
    entropy: list[Any] = metrics.series(ENTROPY)[1] or [None]
    durations, ratios = metrics.series(SECONDS_PER_STEP)[1], metrics.series(EFFECTIVE_UPDATE_RATIO)[1]
    if not durations:
        raise ValueError("the run has no training step")
    return {
        "accuracy_before": accuracy[0],
        "accuracy_after": accuracy[-1],
        "entropy_before": entropy[0],
        "entropy_after": entropy[-1],
        "effective_update_ratio": statistics.fmean(ratios) if ratios else None,
        "steps": len(durations),
        "seconds_per_step": statistics.median(durations),
        "seconds": seconds,
    }


def table(summary: dict[str, float | int | None], title: str) -> Table:
    """The figures of `summarize` for a terminal."""
    shown = {
        "validation accuracy": ("accuracy_before", "accuracy_after", 3),
        "entropy, nats per token": ("entropy_before", "entropy_after", 3),
        "effective update ratio, mean": ("effective_update_ratio", 3),
        "steps": ("steps", 0),
        "seconds per step, median": ("seconds_per_step", 2),
        "seconds in all": ("seconds", 0),
    }
    result = Table("", "", title=title, title_justify="left", box=box.SIMPLE, show_header=False)
    result.columns[1].justify = "right"
    for name, (*keys, digits) in shown.items():
        values = [summary[str(key)] for key in keys]
        result.add_row(name, " → ".join("-" if value is None else f"{value:.{digits}f}" for value in values))
    return result
