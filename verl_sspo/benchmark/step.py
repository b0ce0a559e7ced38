"""Where a training step of the quickstart spends its time, from the metrics that verl wrote."""

import json
from pathlib import Path

import pandas as pd

from verl_sspo.benchmark.measure import Section

PREFIX = "timing_s/"


def measure(metrics: Path) -> list[Section]:
    """Median seconds of a step and of its parts, over all steps except the first and those that validated.

    Args:
        metrics: verl's metrics of a run, as JSON lines.
    """
    title = "A training step of the quickstart"
    if not metrics.is_file():
        missing = f"Not measured: there is no {metrics}. Run `verl-sspo quickstart`, or set --quickstart-metrics."
        return [Section(title, missing, pd.DataFrame())]
    data = pd.DataFrame([json.loads(line)["data"] for line in metrics.read_text().splitlines()])
    steps = data[data[PREFIX + "step"].notna()].iloc[1:]
    if PREFIX + "testing" in steps:
        steps = steps[steps[PREFIX + "testing"].isna()]
    # Names with another slash are parts of parts.
    parts = steps.filter(regex=f"^{PREFIX}[^/]+$").rename(columns=lambda name: name.removeprefix(PREFIX)).fillna(0.0)
    parts["rest"] = 2 * parts["step"] - parts.sum(axis="columns")
    seconds = parts.median().drop("testing", errors="ignore").sort_values(ascending=False)
    table = pd.DataFrame({"seconds": seconds, "fraction of the step": seconds / seconds["step"]})
    return [Section(title, f"Medians over {len(steps)} steps, without the first and those that validated.", table)]
