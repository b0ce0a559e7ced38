"""Metrics over the lag of the rollout, for suites that set `staleness: true` (recipes/suites/staleness.yaml)."""

from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from verl_sspo.experiments import cell
from verl_sspo.experiments.results import PLACE, Results
from verl_sspo.experiments.suite import Suite
from verl_sspo.report import style
from verl_sspo.report.style import picture
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
ORDER = ["algorithm", "updates_per_transfer", "seed", "step"]
CAPTION = (
    "Small dots: single steps. Markers: means over all steps at one number of updates per transfer of the weights. The "
    "lag counts updates between the weights that generated a response and those that learn from it. Second panel: SSPO "
    "logs the mean slope of its gate, GSPO the fraction of tokens that it clips, SAPO neither. Third panel: SSPO alone "
    "has sequence weights. Accuracy: validation after the last step."
)


def sections(results: Results, output: Path) -> list[str]:
    """This part of the report; empty while no run has finished. Also writes staleness.csv, a row per step."""
    data = over_lag(results)
    if data.empty:
        return []
    path = draw(results.suite, data, output / "pictures" / "staleness.svg")
    data.round(5).to_csv(output / "staleness.csv", index=False)
    shown = picture(path, output, "Metrics over the lag of the rollout", CAPTION)
    return ["## Over the lag of the rollout", means_table(results.suite, data), shown]


def over_lag(results: Results) -> pd.DataFrame:
    """A row for each step of the finished runs, with its lag; NaN where a metric is not logged.

    verl counts the weight transfers before the current step, for the newest and the oldest token of a response. Within
    the step, half of the other updates come before an average update.

    Raises:
        KeyError: a run was not asynchronous.
    """
    runs = results.finished
    configs = [OmegaConf.load(folder / cell.CONFIG) for folder in runs["folder"]]
    updates = [config.trainer.v1.separate_async.parameter_sync_step for config in configs]
    steps = results.steps.merge(runs[PLACE].assign(updates_per_transfer=updates), on=PLACE)
    every = steps["updates_per_transfer"]
    newest, oldest = (steps[f"training/off_policy/trajectory_{each}/mean"] for each in ("staleness", "staleness_worst"))
    (accuracy,) = {m for each in results.suite.measures.values() for m in each.metrics if m.startswith("val-")}
    columns = {**{key: key for key in (*ORDER, "lag")}, "accuracy": accuracy, **METRICS}
    data = steps.assign(lag=every * (newest + oldest) / 2 + (every - 1) / 2).reindex(columns=columns.values())
    return data.set_axis([*columns], axis=1).sort_values(ORDER, ignore_index=True)


def means_table(suite: Suite, data: pd.DataFrame) -> str:
    """Means over all steps with the same number of updates per transfer, as Markdown; accuracy is the final one."""
    means = data.drop(columns=["seed", "step"]).groupby(["updates_per_transfer", "algorithm"]).mean()
    order = [(every, key) for every in means.index.levels[0] for key in suite.algorithms if (every, key) in means.index]
    table = means.loc[order].rename(index={key: arm.title for key, arm in suite.algorithms.items()}, level=1)
    return table.astype(object).where(table.notna(), None).reset_index().to_markdown(index=False, floatfmt=".3f")


def draw(suite: Suite, data: pd.DataFrame, path: Path) -> Path:
    """Draws drift, effective update ratio, sequence weights and accuracy over the lag."""
    figure, panels = style.new_figure(2, 2, 4.2, 2.8)
    titles = {
        "kl": "KL(rollout's policy, present one), nats per token",
        "open": "effective update ratio (GSPO: fraction not clipped)",
        "abs_log_weight": "mean |log S| of SSPO's sequence weights",
        "accuracy": "validation accuracy at the end",
    }
    # Losses that clip nothing log 0.
    clips = data.groupby("algorithm")["clipped"].transform("max") > 0
    data = data.assign(open=data["slope"].fillna((1 - data["clipped"]).where(clips)))
    for panel, (column, title) in zip(panels, titles.items(), strict=True):
        style.label(panel, title, "lag of the rollout, updates")
        for index, (key, arm) in enumerate(suite.algorithms.items()):
            steps = data[data["algorithm"] == key]
            if steps[column].isna().all():
                continue
            means = steps.groupby("updates_per_transfer")[["lag", column]].mean()
            look: dict[str, Any] = style.line(index)
            if column != "accuracy":
                panel.plot(steps["lag"], steps[column], ".", color=look["color"], alpha=0.3, markersize=3)
            panel.plot(means["lag"], means[column], label=arm.title, marker=style.MARKERS[index], markersize=5, **look)
        panel.set_xlim(left=0)
    panels[0].plot([], [], ".", color=style.GREY, markersize=3, label="one step")
    logged = set(data.dropna(subset="open")["algorithm"])
    silent = [arm.title for key, arm in suite.algorithms.items() if key in set(data["algorithm"]) - logged]
    note = f"not logged: {', '.join(silent)}" if silent else ""
    panels[1].text(0.03, 0.05, note, transform=panels[1].transAxes, color=style.GREY, fontsize=8)
    style.legend_below(figure, 3)
    return style.save(figure, path)
