"""The learning curves of one run, as one picture."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from verl_sspo.report import style
from verl_sspo.report.summary import EFFECTIVE_UPDATE_RATIO, ENTROPY, REWARD, Metrics

# Steps that a smoothed curve averages over; the dots are the single steps.
WINDOW = 5


def draw(metrics: Metrics, path: Path, title: str, caption: str) -> Path:
    """Draws accuracy, entropy and effective update ratio over the steps of a run.

    Args:
        metrics: of the run.
        path: the picture, `.png` or `.svg`.
        title: a line above it.
        caption: what ran, below it.

    Returns:
        `path`.
    """
    ratios = metrics.series(EFFECTIVE_UPDATE_RATIO)
    figure, panels = style.new_figure(1, 3 if ratios[1] else 2, 4.2, 4.0)
    accuracy, entropy = panels[:2]
    _draw_smoothed(accuracy, *metrics.series(REWARD), style.BLUE, "training reward")
    steps, values = metrics.accuracy
    if values:
        accuracy.plot(steps, values, "o-", color=style.ORANGE, clip_on=False, label="validation accuracy")
        for i, place, align in ((0, (9, -9), "left"), (-1, (0, 9), "right"))[-len(values) :]:
            options: dict[str, Any] = {"textcoords": "offset points", "ha": align, "weight": "bold"}
            accuracy.annotate(f"{values[i]:.2f}", (steps[i], values[i]), place, color=style.ORANGE, **options)
    accuracy.set_ylim(0, 1)
    accuracy.set_ylabel("fraction of responses that are right")
    steps, values = metrics.series(ENTROPY)
    _draw_smoothed(entropy, steps, values, style.GREEN, "entropy")
    entropy.set_ylim(0, max(values, default=1) * 1.15)
    entropy.set_ylabel("nats per token")
    if ratios[1]:
        panels[2].plot(*ratios, color=style.PURPLE, linewidth=1.6, label="one step")
        panels[2].axhline(1, color=style.GREY, linestyle="--", label="1: the gate lets every update through")
        panels[2].set_ylim(min(0.8, *ratios[1]), 1.02)
        panels[2].set_ylabel("mean slope of the gate")
    titles = ("Accuracy", "Entropy of the policy", "Effective update ratio")
    for panel, name in zip(panels, titles, strict=False):
        panel.set_title(name, loc="left", fontsize=11)
        panel.set_xlabel("rollout step")
        panel.set_xlim(0, max(metrics.steps))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        panel.legend(frameon=False, fontsize=8.5, loc="lower right")
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    text = "\n".join(textwrap.wrap(caption, 64 * len(panels)))
    figure.supxlabel(text, fontsize=8.5, color="#555555", x=0.01, ha="left")
    return style.save(figure, path)


def _draw_smoothed(panel: Axes, steps: Sequence[int], values: Sequence[float], color: str, name: str) -> None:
    """Dots at the steps, and a line through the mean of each and those before it, `WINDOW` at most."""
    panel.plot(steps, values, ".", color=color, alpha=0.35, markersize=4, label=f"{name}, one step")
    smooth = pd.Series(values, dtype=float).rolling(WINDOW, min_periods=1).mean()
    panel.plot(steps, smooth, color=color, linewidth=1.6, label=f"{name}, mean of {WINDOW} steps")
