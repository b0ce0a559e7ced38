"""The pictures of a suite: differences to the baseline, and metrics over steps."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from verl_sspo.experiments.results import Results
from verl_sspo.report import style
from verl_sspo.report.summary import EFFECTIVE_UPDATE_RATIO, ENTROPY, REWARD

#: Panels of the metrics over steps: title -> metric of verl. Only SSPO logs the last four.
PANELS = {
    "validation accuracy": None,
    "training reward": REWARD,
    "entropy, nats per token": ENTROPY,
    "gradient norm": "actor/grad_norm",
    "effective update ratio": EFFECTIVE_UPDATE_RATIO,
    "sequence weights, mean |log S|": "actor/sspo/abs_log_weight",
    "gradient lost on forward tokens": "actor/sspo/lost_forward",
    "gradient lost on corrective tokens": "actor/sspo/lost_corrective",
}


def draw_differences(results: Results, variant: str, path: Path) -> Path:
    """Draws a row per algorithm and a panel per measure: each seed, the mean, its interval alone and among all."""
    suite, (raw, table) = results.suite, results.differences(variant)
    shown = [key for key in suite.algorithms if key in table.index.get_level_values(1)]
    figure, panels = style.new_figure(1, len(suite.measures), 3.6, 1.2 + 0.27 * len(shown))
    for panel, (title, measure) in zip(panels, suite.measures.items(), strict=True):
        style.label(
            panel, title, f"difference to {suite.algorithms[suite.baseline].title}" + ", points" * measure.percent
        )
        panel.axvline(0, color=style.GREY, linewidth=1)
        panel.set_ylim(len(shown) - 0.5, -0.5)
        panel.set_yticks(range(len(shown)), [suite.algorithms[k].title for k in shown] if panel is panels[0] else [])
        own = table.loc[title].reindex(shown)
        seeds = raw[title].reindex(columns=shown)
        rows = range(len(shown))
        label = "95 %, all comparisons at once"
        panel.hlines(rows, own["low_all"], own["high_all"], color=style.BLUE, linewidth=0.8, label=label)
        panel.hlines(rows, own["low"], own["high"], color=style.BLUE, linewidth=2.4, label="95 %, this one alone")
        for row, key in enumerate(shown):
            dots = seeds[key].dropna()
            panel.plot(dots, [row] * len(dots), "o", color=style.ORANGE, markersize=3.5, alpha=0.7, label="one seed")
        panel.plot(own["mean"], rows, "D", color=style.BLUE, markersize=5, label="mean of the seeds")
        # The widest intervals of three seeds would leave no room for the rest: cut them at the edge of the panel.
        seen = pd.concat([seeds.stack(), own["low"], own["high"], pd.Series([0.0])]).dropna()
        margin = 0.08 * (seen.max() - seen.min()) or 1.0
        panel.set_xlim(seen.min() - margin, seen.max() + margin)
    style.legend_below(figure, 2)
    return style.save(figure, path)


def draw_curves(results: Results, variant: str, algorithms: Sequence[str], path: Path) -> Path:
    """Draws all panels for some algorithms of one variant; a panel without data says so."""
    suite = results.suite
    steps = results.steps[results.steps["variant"] == variant]
    figure, axes = style.new_figure(4, 2, 4.6, 2.5)
    accuracies = next((m.metrics for m in suite.measures.values() if m.metrics[0].startswith("val-")), [])
    for panel, (title, metric) in zip(axes, PANELS.items(), strict=True):
        style.label(panel, title, "step")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        panel.ticklabel_format(axis="y", useOffset=False)
        # The mean of several data sets, as in the table.
        names = [metric] if metric else accuracies
        logged = steps.assign(value=steps.reindex(columns=names).mean(axis=1)).dropna(subset=["value"])
        if logged.empty:
            panel.text(0.5, 0.5, "not logged (yet)", transform=panel.transAxes, ha="center", color=style.GREY)
            continue
        for index, key in enumerate(algorithms):
            values = logged.loc[logged["algorithm"] == key, ["step", "value"]]
            _draw_curve(panel, values.groupby("step")["value"], index, suite.algorithms[key].title)
        if title == "gradient norm":
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter(NullFormatter())
    style.legend_below(figure, 3)
    return style.save(figure, path)


def _draw_curve(panel: Axes, values: pd.core.groupby.SeriesGroupBy, index: int, title: str) -> None:
    """Draws one algorithm: the mean over seeds at every step; with a single step, every seed and the mean."""
    look, means = style.line(index), values.mean()
    if len(means) > 1:
        panel.plot(means.index, means, linewidth=1.5, label=title, **look)
    elif len(means) == 1:
        dots = values.get_group(means.index[0])
        panel.plot([index] * len(dots), dots, "o", markersize=3, alpha=0.5, color=look["color"])
        panel.plot([index], means, "D", markersize=6, color=look["color"])
        # Only for the legend.
        panel.plot([], [], "o", markersize=3, color=style.GREY, label="one seed")
        panel.plot([], [], "D", markersize=6, color=style.GREY, label="mean of the seeds")
        panel.set_xticks([])
        panel.set_xlabel(f"after step {means.index[0]}")
