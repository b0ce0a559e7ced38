"""The runs of a suite as they lie in their folders, finished or not."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from verl_sspo.experiments import cell as cells
from verl_sspo.experiments import evaluation
from verl_sspo.experiments.suite import Measure, Suite, load_suite
from verl_sspo.report.summary import Metrics


@dataclass(frozen=True)
class Run:
    """One run: its place in the suite, its state (`verl_sspo.experiments.cell.state`) and what it has logged so far."""

    folder: Path
    suite: str
    variant: str
    algorithm: str
    seed: int
    state: str
    metrics: Metrics
    ran_with: list[dict[str, str | None]]

    def value(self, measure: Measure, first: bool = False) -> float | None:
        """What stands for the run in a table: of several metrics the mean; None if one of them was not logged.

        Args:
            measure: the column.
            first: the value before training instead; None for the mean of a run, which has none.
        """
        values = []
        for name in measure.metrics:
            steps, series = self.metrics.series(name)
            if first and measure.summary == "mean":
                return None
            if not series or (first and steps[0] != 0):
                return None
            if measure.summary == "mean":
                values.append(sum(series) / len(series))
            else:
                values.append(series[0] if first else series[-1])
        return sum(values) / len(values)


def read_suite(root: Path) -> Suite:
    """The suite that the runs below `root` belong to, as `reproduce.py` copied it.

    Raises:
        FileNotFoundError: `root` holds no runs of a suite.
    """
    path = root / "suite.yaml"
    if not path.exists():
        raise FileNotFoundError(f"{root} holds no runs of a suite: give the folder that verl-sspo reproduce wrote to")
    return load_suite(path)


def read_runs(root: Path) -> list[Run]:
    """All runs below `root` that have started."""
    runs = []
    for plan in sorted(root.glob(f"*/*/*/{cells.PLAN}")):
        content, folder = json.loads(plan.read_text()), plan.parent
        place = {key: content[key] for key in ("suite", "variant", "algorithm", "seed")}
        ran_with = [content["ran_with"], *content.get("went_on_with", [])]
        runs.append(Run(folder, **place, state=cells.state(folder), metrics=read_metrics(folder), ran_with=ran_with))
    return runs


def read_metrics(folder: Path) -> Metrics:
    """What the attempts of a cell have logged, as one run. An evaluation's metrics stand at the last step."""
    steps = Metrics.read_attempts(cells.attempts(folder)).steps
    evaluated = folder / cells.EVALUATION / evaluation.METRICS
    if evaluated.exists():
        steps.setdefault(max(steps, default=0), {}).update(json.loads(evaluated.read_text()))
    return Metrics(steps)


def by_seed(runs: Sequence[Run], measure: Measure, first: bool = False) -> pd.DataFrame:
    """Values of the finished runs: (variant, algorithm) as rows, seeds as columns, NaN where there is none."""
    values = [
        (run.variant, run.algorithm, run.seed, run.value(measure, first)) for run in runs if run.state == "finished"
    ]
    table = pd.DataFrame(values, columns=["variant", "algorithm", "seed", "value"]).astype({"value": float})
    return table.pivot(index=["variant", "algorithm"], columns="seed", values="value")


def of_seeds(table: pd.DataFrame, variant: str, algorithm: str | None) -> dict[int, float]:
    """Of a table of `by_seed`: the values by seed, of one algorithm or the mean of all."""
    rows = [key for key in table.index if key[0] == variant and algorithm in (None, key[1])]
    means = table.loc[rows].mean()
    return {int(seed): float(value) for seed, value in means.items() if math.isfinite(value)}
