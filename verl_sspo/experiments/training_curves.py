"""Metrics over steps, algorithm by algorithm: the mean over seeds with a 95% interval."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from verl_sspo.experiments.runs import Run
from verl_sspo.experiments.suite import Suite
from verl_sspo.report import style
from verl_sspo.report.statistics import mean
from verl_sspo.report.summary import EFFECTIVE_UPDATE_RATIO, ENTROPY, REWARD

VALIDATION = "validation accuracy"
#: Panels: title -> metric of verl. The last four are logged by SSPO alone.
PANELS = {
    VALIDATION: None,
    "training reward": REWARD,
    "entropy, nats a token": ENTROPY,
    "gradient norm": "actor/grad_norm",
    "effective update ratio": EFFECTIVE_UPDATE_RATIO,
    "sequence weights, mean |log S|": "actor/sspo/abs_log_weight",
    "gradient lost on forward tokens": "actor/sspo/lost_forward",
    "gradient lost on corrective tokens": "actor/sspo/lost_corrective",
}


def draw(suite: Suite, runs: Sequence[Run], variant: str, algorithms: Sequence[str], path: Path) -> Path:
    """All panels for some algorithms of one variant; a panel says so if nothing of it was logged."""
    chosen = [run for run in runs if run.variant == variant and run.metrics.steps]
    figure, axes = style.new_figure(4, 2, 4.6, 2.5)
    accuracies = [m.metrics[0] for m in suite.measures.values() if m.metrics[0].startswith("val-")]
    for panel, (title, metric) in zip(axes, PANELS.items(), strict=True):
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_xlabel("step")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        panel.ticklabel_format(axis="y", useOffset=False)
        name = metric or (accuracies[0] if accuracies else None)
        drawn = [
            _draw_curve(
                panel, [run for run in chosen if run.algorithm == key], name, index, suite.algorithms[key].title
            )
            for index, key in enumerate(algorithms)
        ]
        if not any(drawn):
            panel.text(0.5, 0.5, "not logged (yet)", transform=panel.transAxes, ha="center", color="#767676")
        if title == "gradient norm" and any(drawn):
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter(NullFormatter())
    # Every algorithm that ran is in the panel of the reward.
    style.legend_below(figure, max(axes, key=lambda each: len(each.get_legend_handles_labels()[1])), 4)
    return style.save(figure, path)


def _draw_curve(panel: Axes, runs: Sequence[Run], name: str | None, index: int, title: str) -> bool:
    """One algorithm; False if nothing of it was logged under `name`."""
    at: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        for step, value in zip(*(run.metrics.series(name) if name else ((), ())), strict=True):
            at[step].append(value)
    steps = sorted(at)
    if not steps:
        return False
    look = style.line(index)
    estimates = [estimate for step in steps if (estimate := mean(at[step]))]
    low = [each.value if each.low is None else each.low for each in estimates]
    high = [each.value if each.high is None else each.high for each in estimates]
    if len(steps) == 1:
        # No line to draw: a dot with its interval, beside the dots of the others.
        (estimate,) = estimates
        interval = [[estimate.value - low[0]], [high[0] - estimate.value]]
        panel.errorbar([index], [estimate.value], interval, fmt="o", markersize=5, color=look["color"])
        panel.set_xticks([])
        panel.set_xlabel(f"after step {steps[0]}, in the order of the legend")
        return True
    panel.plot(steps, [each.value for each in estimates], linewidth=1.5, label=title, **look)
    panel.fill_between(steps, low, high, color=str(look["color"]), alpha=0.12, linewidth=0)
    return True
