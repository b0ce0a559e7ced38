"""The learning curves of one run, as one picture."""

import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from verl_sspo.report.summary import EFFECTIVE_UPDATE_RATIO, ENTROPY, REWARD, Metrics

# Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#767676"

# Steps that a smoothed curve averages over; the dots are the single steps.
WINDOW = 5


def smoothed(values: list[float], window: int = WINDOW) -> list[float]:
    """Mean of each value and those before it, at most `window` of them."""
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i + 1 - window) : i + 1])]


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
    panels = [_draw_accuracy, _draw_entropy]
    if metrics.series(EFFECTIVE_UPDATE_RATIO)[1]:
        panels.append(_draw_effective_update_ratio)
    figure = Figure(figsize=(4.2 * len(panels), 4.0), dpi=160, layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        panel(axes, metrics)
        axes.set_xlabel("rollout step")
        axes.set_xlim(0, max(metrics.steps))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.grid(color="#E4E4E4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    text = "\n".join(textwrap.wrap(caption, 64 * len(panels)))
    figure.supxlabel(text, fontsize=8.5, color="#555555", x=0.01, ha="left")
    figure.get_layout_engine().set(wspace=0.06, w_pad=0.08)  # type: ignore[union-attr, call-arg]
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _draw_accuracy(axes: Axes, metrics: Metrics) -> None:
    axes.set_title("Accuracy", loc="left", fontsize=11)
    steps, rewards = metrics.series(REWARD)
    axes.plot(steps, rewards, ".", color=BLUE, alpha=0.35, markersize=4)
    axes.plot(steps, smoothed(rewards), color=BLUE, linewidth=1.6, label=f"training reward, mean of {WINDOW} steps")
    steps, accuracies = metrics.accuracy
    if accuracies:
        axes.plot(steps, accuracies, "o-", color=ORANGE, markersize=6, clip_on=False, label="validation accuracy")
        for i, place, align in ((0, (9, -9), "left"), (-1, (0, 9), "right")):
            at, label = (steps[i], accuracies[i]), f"{accuracies[i]:.2f}"
            axes.annotate(label, at, place, textcoords="offset points", ha=align, color=ORANGE, weight="bold")
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of responses that are right")
    axes.legend(frameon=False, fontsize=8.5, loc="lower right")


def _draw_entropy(axes: Axes, metrics: Metrics) -> None:
    axes.set_title("Entropy of the policy", loc="left", fontsize=11)
    steps, entropies = metrics.series(ENTROPY)
    axes.plot(steps, entropies, ".", color=GREEN, alpha=0.35, markersize=4)
    axes.plot(steps, smoothed(entropies), color=GREEN, linewidth=1.6)
    axes.set_ylim(0, max(entropies, default=1) * 1.15)
    axes.set_ylabel("nats per token")


def _draw_effective_update_ratio(axes: Axes, metrics: Metrics) -> None:
    axes.set_title("Effective update ratio", loc="left", fontsize=11)
    steps, ratios = metrics.series(EFFECTIVE_UPDATE_RATIO)
    axes.plot(steps, ratios, color=PURPLE, linewidth=1.6)
    axes.axhline(1, color=GREY, linewidth=1, linestyle="--")
    note = "1: the gate lets every update through"
    axes.annotate(note, (0.02, 1), (0, 3), ("axes fraction", "data"), "offset points", fontsize=8.5, color=GREY)
    low = min([0.8, *ratios])
    axes.set_ylim(low, 1 + 0.12 * (1 - low))
    axes.set_ylabel("mean slope of the gate")
