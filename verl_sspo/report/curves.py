"""The learning curves of one run, as one picture."""

import textwrap
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from verl_sspo.report import style
from verl_sspo.report.summary import EFFECTIVE_UPDATE_RATIO, ENTROPY, REWARD, accuracy, series

# Steps that a smoothed curve averages over; dots show single steps.
WINDOW = 5


def draw(metrics: pd.DataFrame, path: Path, title: str, caption: str) -> Path:
    """Draws accuracy, entropy and effective update ratio over the steps of a run.

    Args:
        metrics: of the run.
        path: the picture, `.png` or `.svg`.
        title: a line above it.
        caption: what ran, below it.

    Returns:
        `path`.
    """
    ratios, right, entropies = series(metrics, EFFECTIVE_UPDATE_RATIO), accuracy(metrics), series(metrics, ENTROPY)
    figure, panels = style.new_figure(1, 2 if ratios.empty else 3, 4.2, 4.0)
    _draw_smoothed(panels[0], series(metrics, REWARD), style.BLUE, "training reward")
    if not right.empty:
        panels[0].plot(right, "o-", color=style.ORANGE, clip_on=False, label="validation accuracy")
        for i, place, align in ((0, (9, -9), "left"), (-1, (0, 9), "right"))[-len(right) :]:
            options: dict[str, Any] = {"textcoords": "offset points", "ha": align, "weight": "bold"}
            point = (right.index[i], right.iloc[i])
            panels[0].annotate(f"{point[1]:.2f}", point, place, color=style.ORANGE, **options)
    panels[0].set_ylim(0, 1)
    panels[0].set_ylabel("fraction of responses that are right")
    _draw_smoothed(panels[1], entropies, style.GREEN, "entropy")
    panels[1].set_ylim(0, max(entropies, default=1) * 1.15)
    panels[1].set_ylabel("nats per token")
    if not ratios.empty:
        panels[2].plot(ratios, color=style.PURPLE, linewidth=1.6, label="one step")
        panels[2].axhline(1, color=style.GREY, linestyle="--", label="1: the gate lets every update through")
        panels[2].set_ylim(min(0.8, *ratios), 1.02)
        panels[2].set_ylabel("mean slope of the gate")
    titles = ("Accuracy", "Entropy of the policy", "Effective update ratio")
    for panel, name in zip(panels, titles, strict=False):
        panel.set_title(name, loc="left", fontsize=11)
        panel.set_xlabel("rollout step")
        panel.set_xlim(0, metrics.index.max())
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        panel.legend(frameon=False, fontsize=8.5, loc="best")
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    text = "\n".join(textwrap.wrap(caption, 64 * len(panels)))
    figure.supxlabel(text, fontsize=8.5, color="#555555", x=0.01, ha="left")
    return style.save(figure, path)


def _draw_smoothed(panel: Axes, values: pd.Series, color: str, name: str) -> None:
    """Plots each step as a dot, and the running mean over up to `WINDOW` steps as a line."""
    panel.plot(values, ".", color=color, alpha=0.35, markersize=4, label=f"{name}, one step")
    smooth = values.rolling(WINDOW, min_periods=1).mean()
    panel.plot(smooth, color=color, linewidth=1.6, label=f"{name}, mean of {WINDOW} steps")
