"""What the runs of recipes/suites/staleness.yaml say over the lag of their rollouts: a picture and its data.

    python -m verl_sspo.report.staleness runs/staleness --output docs/trust

writes staleness.png and staleness.csv, a row a run.
"""

import argparse
import statistics
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from omegaconf import OmegaConf

from verl_sspo.report import style
from verl_sspo.report.runs import Run, read_runs, read_suite
from verl_sspo.report.summary import EFFECTIVE_UPDATE_RATIO, REWARD
from verl_sspo.suites import cell
from verl_sspo.suites.definition import Suite

LAG = "lag"
#: Columns that are the mean over a run's steps: name -> metric of verl. Only SSPO logs `actor/sspo/*`.
MEANS = {
    "training_reward": REWARD,
    "entropy": "actor/entropy_loss",
    "kl": "actor/ppo_kl",
    "abs_log_ratio": "actor/sspo/abs_log_ratio",
    "slope": EFFECTIVE_UPDATE_RATIO,
    "clipped": "actor/pg_clipfrac",
    "sequence_weight": "actor/sspo/sequence_weight",
    "sequence_weight_std": "actor/sspo/sequence_weight_std",
}
#: Names of the lag in verl's metrics, in transfers of weights: of the newest and of the oldest token of a response.
_STALENESS = tuple(f"training/off_policy/trajectory_{name}/mean" for name in ("staleness", "staleness_worst"))


def lag(run: Run, updates_per_transfer: int) -> float:
    """Updates between the weights that generated a response and those that learn from it, mean over the run.

    verl counts transfers before the present step; of the step's own updates, half lie before an average one.
    """
    transfers = statistics.fmean(value for name in _STALENESS for value in run.metrics.series(name)[1])
    return updates_per_transfer * transfers + (updates_per_transfer - 1) / 2


def table(suite: Suite, runs: list[Run]) -> pd.DataFrame:
    """A row for each finished run; NaN where an algorithm does not log a metric."""
    accuracy = next(measure for measure in suite.measures.values() if measure.metrics[0].startswith("val-"))
    rows = []
    for run in runs:
        if run.state != "finished":
            continue
        config = OmegaConf.load(run.folder / cell.CONFIG)
        every = config.trainer.v1.separate_async.parameter_sync_step
        series = {column: run.metrics.series(metric)[1] for column, metric in MEANS.items()}
        means = {column: statistics.fmean(values) if values else None for column, values in series.items()}
        weights = {
            f"sequence_weight_{end.__name__}": end(run.metrics.series(f"actor/sspo/sequence_weight_{end.__name__}")[1])
            for end in (min, max)
            if means["sequence_weight"] is not None
        }
        place = {"algorithm": run.algorithm, "seed": run.seed, "updates_per_transfer": every, LAG: lag(run, every)}
        rows.append(place | {"accuracy": run.value(accuracy)} | means | weights)
    return pd.DataFrame(rows).sort_values(["algorithm", "updates_per_transfer", "seed"], ignore_index=True)


def draw(suite: Suite, data: pd.DataFrame, path: Path) -> Path:
    """Four panels over the lag, the mean over seeds of every algorithm."""
    figure, (drift, ratio, weight, accuracy) = style.new_figure(2, 2, 4.2, 2.8)
    for index, (key, arm) in enumerate(suite.algorithms.items()):
        own = data[data.algorithm == key].groupby("updates_per_transfer").mean(numeric_only=True)
        look = style.line(index) | {"marker": style.MARKERS[index], "markersize": 5}
        drift.plot(own[LAG], own["kl"], label=arm.title, **look)
        if own["slope"].notna().any():
            ratio.plot(own[LAG], own["slope"], **look)
            weight.fill_between(
                own[LAG], own["sequence_weight_min"], own["sequence_weight_max"], color="#E4E4E4", label="extremes"
            )
            low, high = (own["sequence_weight"] + sign * own["sequence_weight_std"] for sign in (-1, 1))
            weight.fill_between(own[LAG], low, high, color="#B0B0B0", label="± standard deviation")
            weight.plot(own[LAG], own["sequence_weight"], **look)
            weight.legend(frameon=False, fontsize=8)
        elif own["clipped"].any():
            ratio.plot(own[LAG], 1 - own["clipped"], **look)
        accuracy.plot(own[LAG], 100 * own["accuracy"], **look)
        accuracy.plot(own[LAG], 100 * own["training_reward"], **look, alpha=0.35)
    _name(drift, "drift: KL(rollout's policy, present one), nats a token")
    _name(ratio, "effective update ratio (GSPO: share not clipped)")
    _name(weight, "sequence weights of SSPO")
    _name(accuracy, "accuracy at the end, %  (faint: mean reward of training)")
    style.legend_below(figure, drift, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _name(panel: Axes, title: str) -> None:
    panel.set_title(title, loc="left", fontsize=9)
    panel.set_xlabel("mean lag of the rollout, updates")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="the folder that scripts/reproduce.py wrote to")
    parser.add_argument("--output", type=Path, required=True, help="folder of picture and data")
    arguments = parser.parse_args()
    suite = read_suite(arguments.runs)
    data = table(suite, read_runs(arguments.runs))
    print(draw(suite, data, arguments.output / "staleness.png"))
    data.round(5).to_csv(arguments.output / "staleness.csv", index=False)


if __name__ == "__main__":
    main()
