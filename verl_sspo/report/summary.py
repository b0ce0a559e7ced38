"""The figures of one run, from the metrics that verl writes as JSON lines.

The metrics of a run are a DataFrame: a row per step, a column per metric, NaN where it was not logged. Step 0 is the
validation before training, training steps count from 1.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from rich import box
from rich.table import Table

# verl's metrics in the folder of a run, one JSON object per step.
METRICS = "metrics.jsonl"
# The mean slope of the gate, see `verl_sspo.algorithm.metrics`. Other losses do not have it.
EFFECTIVE_UPDATE_RATIO = "actor/sspo/slope"
ENTROPY = "actor/entropy"
REWARD = "critic/score/mean"
SECONDS_PER_STEP = "timing_s/step"


def read_metrics(path: Path) -> pd.DataFrame:
    """Reads a file of verl's logger `file`. The result is empty if there is no file or no complete line yet."""
    text = path.read_text() if path.exists() else ""
    # A run that was killed may leave half a line.
    entries = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    table = pd.DataFrame([each["data"] for each in entries], index=[each["step"] for each in entries])
    return table.groupby(level=0).last().select_dtypes("number").replace([np.inf, -np.inf], np.nan)


def read_attempts(folders: Sequence[Path]) -> pd.DataFrame:
    """Merges the metrics of several starts of a run, oldest first, into one run.

    A resumed start replaces the steps logged before it that come after the step it resumed from. Its initial validation
    joins that step.
    """
    run = pd.DataFrame()
    for resumed in (read_metrics(folder / METRICS) for folder in folders):
        if len(resumed):
            # Of two rows of a step, the later one wins wherever it has a value.
            run = pd.concat([run[run.index <= resumed.index[0]], resumed]).groupby(level=0).last()
    return run


def series(metrics: pd.DataFrame, name: str) -> pd.Series:
    """A metric over the steps at which it was logged; empty if it never was."""
    return metrics.get(name, pd.Series(dtype=float)).dropna()


def accuracy(metrics: pd.DataFrame) -> pd.Series:
    """The validation accuracy over the steps that validated: the mean of `val-core/<data source>/acc/mean@<n>`."""
    return metrics.filter(regex=r"^val-core/.*/mean@").mean(axis=1).dropna()


def summarize(metrics: pd.DataFrame, seconds: float) -> dict[str, float | int | None]:
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
    durations, ratios = series(metrics, SECONDS_PER_STEP), series(metrics, EFFECTIVE_UPDATE_RATIO)
    if durations.empty:
        raise ValueError("the run has no training step")
    figures: dict[str, float | int | None] = {}
    for name, values in {"accuracy": accuracy(metrics), "entropy": series(metrics, ENTROPY)}.items():
        first, last = (None, None) if values.empty else values.iloc[[0, -1]].tolist()
        figures |= {f"{name}_before": first, f"{name}_after": last}
    return figures | {
        "effective_update_ratio": None if ratios.empty else float(ratios.mean()),
        "steps": len(durations),
        "seconds_per_step": float(durations.median()),
        "seconds": seconds,
    }


def table(summary: dict[str, float | int | None], title: str) -> Table:
    """The figures of `summarize`, for a terminal."""
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
