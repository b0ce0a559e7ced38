"""Tables of a suite's runs, finished or not: a row per run, a row per step, and the differences between runs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from verl_sspo.experiments import cell
from verl_sspo.experiments.evaluation import METRICS
from verl_sspo.experiments.suite import Measure, Suite, load_suite
from verl_sspo.report.statistics import paired_differences
from verl_sspo.report.summary import REWARD, read_attempts

PLACE = ["variant", "algorithm", "seed"]

# A run has collapsed if the mean reward of its last LAST_ROLLOUTS rollouts is below COLLAPSED times that of its first
# rollout, which is from the untrained policy. Our choice.
LAST_ROLLOUTS = 4
COLLAPSED = 0.5


@dataclass(frozen=True)
class Results:
    """What the runs of a suite have logged."""

    suite: Suite
    # A row per started run: variant, algorithm, seed, suite (its name), state (`cell.state`), folder, versions (list).
    runs: pd.DataFrame
    # A row per run and step: variant, algorithm, seed, step, and a column per metric of verl.
    steps: pd.DataFrame

    @property
    def finished(self) -> pd.DataFrame:
        """The rows of finished runs."""
        return self.runs[self.runs["state"] == "finished"]

    def values(self, measure: Measure, variant: str, first: bool = False) -> pd.DataFrame:
        """The value of each finished run, or with `first` its value before training.

        Returns:
            A row per seed, a column per algorithm in the order of the suite, NaN where a metric was not logged.
        """
        runs = self.finished[self.finished["variant"] == variant]
        steps = self.steps.merge(runs[PLACE], on=PLACE).reindex(columns=[*PLACE, "step", *measure.metrics])
        if first:
            # A mean over steps has no value before training.
            steps = steps[(steps["step"] == 0) & (measure.summary == "last")]
        values = steps.groupby(["seed", "algorithm"])[measure.metrics].agg(measure.summary)
        table = values.mean(axis=1, skipna=False).unstack("algorithm")
        return table.reindex(columns=[key for key in self.suite.algorithms if key in table]).dropna(how="all")

    def differences(self, variant: str) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Differences to the baseline, seed by seed, and their `paired_differences`, as one family of comparisons.

        Returns:
            A row per seed and a column per (measure, algorithm); a row per (measure, algorithm). Measures in percent
            are in percentage points.
        """
        columns: dict[tuple[str, str], pd.Series] = {}
        for title, measure in self.suite.measures.items():
            table = (100 if measure.percent else 1) * self.values(measure, variant)
            if self.suite.baseline in table:
                others = table.drop(columns=self.suite.baseline)
                columns |= {(title, key): others[key] - table[self.suite.baseline] for key in others}
        raw = pd.DataFrame(columns, columns=pd.MultiIndex.from_tuples(list(columns) or [("", "")]))
        return raw, paired_differences(raw)

    def collapsed(self, variant: str, algorithm: str) -> str:
        """How many of the finished runs that logged at least two rollouts have collapsed, as `collapsed/runs`."""
        runs = self.finished.query("variant == @variant and algorithm == @algorithm")
        steps = self.steps.reindex(columns=[*PLACE, REWARD]).dropna().merge(runs[PLACE], on=PLACE)
        rewards = [each for _, each in steps.groupby("seed")[REWARD] if len(each) > 1]
        ended = [each.iloc[1:].tail(LAST_ROLLOUTS).mean() < COLLAPSED * each.iloc[0] for each in rewards]
        return f"{sum(ended)}/{len(ended)}" if ended else ""


def read_results(root: Path) -> Results:
    """Reads the runs that `verl-sspo reproduce` wrote below `root`.

    Raises:
        FileNotFoundError: `root` holds no runs of a suite.
    """
    path = root / "suite.yaml"
    if not path.exists():
        raise FileNotFoundError(f"{root} holds no runs of a suite: give the folder that verl-sspo reproduce wrote to")
    runs: list[dict[str, Any]] = []
    steps: dict[tuple[Any, ...], pd.DataFrame] = {}
    for plan in sorted(root.glob(f"*/*/*/{cell.PLAN}")):
        content, folder = cell.plan_of(plan.parent), plan.parent
        known = {key: content[key] for key in (*PLACE, "suite", "versions")}
        runs.append(known | {"state": cell.state(folder), "folder": folder})
        steps[tuple(content[key] for key in PLACE)] = read_metrics(folder)
    logged = pd.concat(steps, names=[*PLACE, "step"]).reset_index() if steps else pd.DataFrame(columns=[*PLACE, "step"])
    columns = [*PLACE, "suite", "state", "folder", "versions"]
    return Results(load_suite(path), pd.DataFrame(runs, columns=columns), logged)


def read_metrics(folder: Path) -> pd.DataFrame:
    """The metrics of all attempts of a cell, as one run. Those of an evaluation are added to the last step."""
    steps = read_attempts(cell.attempts(folder))
    evaluated = folder / cell.EVALUATION / METRICS
    if evaluated.exists():
        last = pd.DataFrame(json.loads(evaluated.read_text()), index=[max(steps.index, default=0)])
        steps = pd.concat([steps, last]).groupby(level=0).last()
    return steps
