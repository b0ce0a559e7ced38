"""What the runs of recipes/suites/staleness.yaml say over the lag of their rollouts: a picture and its data.

    python -m verl_sspo.experiments.staleness runs/staleness --output docs/trust

writes staleness.png and staleness.csv, a row a step, and prints their means as a table.
"""

import argparse
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from omegaconf import OmegaConf

from verl_sspo.experiments import cell
from verl_sspo.experiments.runs import Run, read_runs, read_suite
from verl_sspo.experiments.suite import Suite
from verl_sspo.report import style
from verl_sspo.report.document import markdown_table
from verl_sspo.report.summary import EFFECTIVE_UPDATE_RATIO, REWARD

#: Columns of the data: name -> metric of verl, the mean over the updates of a step. Only SSPO logs `actor/sspo/*`.
METRICS = {
    "reward": REWARD,
    "entropy": "actor/entropy_loss",
    "kl": "actor/ppo_kl",
    "clipped": "actor/pg_clipfrac",
    "abs_log_ratio": "actor/sspo/abs_log_ratio",
    "slope": EFFECTIVE_UPDATE_RATIO,
    "weight": "actor/sspo/sequence_weight",
    "abs_log_weight": "actor/sspo/abs_log_weight",
}


def lag(data: dict[str, float], updates_per_transfer: int) -> float:
    """Updates between the weights that generated a response and those that learn from it, mean over a step.

    verl counts transfers before the present step, for the newest and for the oldest token of a response; of the
    step's own updates, half lie before an average one.
    """
    newest, oldest = (data[f"training/off_policy/trajectory_{name}/mean"] for name in ("staleness", "staleness_worst"))
    return updates_per_transfer * (newest + oldest) / 2 + (updates_per_transfer - 1) / 2


def table(suite: Suite, runs: list[Run]) -> pd.DataFrame:
    """A row for each step of the finished runs; NaN where a metric is not logged."""
    (accuracy,) = {name for each in suite.measures.values() for name in each.metrics if name.startswith("val-")}
    rows = []
    for run in runs:
        if run.state != "finished":
            continue
        every = OmegaConf.load(run.folder / cell.CONFIG).trainer.v1.separate_async.parameter_sync_step
        place = {"algorithm": run.algorithm, "updates_per_transfer": every, "seed": run.seed}
        rows += [
            place
            | {"step": step, "lag": lag(data, every), "accuracy": data.get(accuracy)}
            | {column: data.get(metric) for column, metric in METRICS.items()}
            for step, data in run.metrics.steps.items()
        ]
    data = pd.DataFrame(rows).astype(dict.fromkeys(("accuracy", *METRICS), float))
    return data.sort_values(["algorithm", "updates_per_transfer", "seed", "step"], ignore_index=True)


def summary(suite: Suite, data: pd.DataFrame) -> str:
    """Means over all steps at one frequency of transfers, as Markdown; accuracies are those at the end."""
    columns = ("lag", "kl", "abs_log_ratio", "slope", "clipped", "weight", "abs_log_weight", "entropy")
    means = data.groupby(["updates_per_transfer", "algorithm"]).mean(numeric_only=True)
    rows = [
        [f"{suite.algorithms[algorithm].title}, {every}", f"{own.lag:.1f}"]
        + ["" if pd.isna(own[column]) else f"{own[column]:.3f}" for column in columns[1:]]
        + [f"{100 * own.reward:.1f}", f"{100 * own.accuracy:.1f}"]
        for every in sorted(data.updates_per_transfer.unique())
        for algorithm in suite.algorithms
        if (every, algorithm) in means.index
        for own in [means.loc[every, algorithm]]
    ]
    return markdown_table(["algorithm, updates per transfer", *columns, "reward, %", "accuracy, %"], rows)


def draw(suite: Suite, data: pd.DataFrame, path: Path) -> Path:
    """Four panels over the lag: dots are steps, lines go through the means over all steps at one frequency."""
    figure, (drift, ratio, weight, accuracy) = style.new_figure(2, 2, 4.2, 2.8)
    for index, (key, arm) in enumerate(suite.algorithms.items()):
        steps = data[data.algorithm == key].assign(open=lambda own: own.slope.fillna(1 - own.clipped))
        means = steps.groupby("updates_per_transfer").mean(numeric_only=True)
        look = style.line(index) | {"marker": style.MARKERS[index], "markersize": 5}
        shown = [(drift, "kl"), (ratio, "open")]
        if steps.weight.notna().any():
            weight.plot(steps.lag, steps.abs_log_weight, ".", color=look["color"], alpha=0.3, markersize=3)
            weight.plot(means.lag, means.abs_log_weight, **look)
        elif not steps.clipped.any():
            # verl's SAPO logs 0 for what it does not have.
            shown.remove((ratio, "open"))
        for panel, column in shown:
            panel.plot(steps.lag, steps[column], ".", color=look["color"], alpha=0.3, markersize=3)
            panel.plot(means.lag, means[column], label=arm.title, **look)
        accuracy.plot(means.lag, 100 * means.accuracy, **look)
    _name(drift, "KL(rollout's policy, present one), nats a token")
    _name(ratio, "effective update ratio (GSPO: share not clipped)")
    _name(weight, "mean |log S| of SSPO's sequence weights")
    _name(accuracy, "validation accuracy at the end, %")
    style.legend_below(figure, drift, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _name(panel: Axes, title: str) -> None:
    panel.set_title(title, loc="left", fontsize=9)
    panel.set_xlabel("lag of the rollout, updates")
    panel.set_xlim(left=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="the folder that verl-sspo reproduce wrote to")
    parser.add_argument("--output", type=Path, required=True, help="folder of picture and data")
    arguments = parser.parse_args()
    suite = read_suite(arguments.runs)
    data = table(suite, read_runs(arguments.runs))
    draw(suite, data, arguments.output / "staleness.png")
    print(summary(suite, data))
    data.round(5).to_csv(arguments.output / "staleness.csv", index=False)


if __name__ == "__main__":
    main()
