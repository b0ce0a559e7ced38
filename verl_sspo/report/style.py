"""How all pictures look: colours for the colour-blind too, a line style besides, type for a printed page."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours without yellow, which is too light on paper, and dash patterns of another period: a line is
# told by either.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 1.5), (1, 1.2), (7, 1.5, 1, 1.5), (3, 1))
MARKERS = "osD^vPX<>*"


def line(index: int) -> dict[str, Any]:
    """Colour and dashes of the index-th curve, different for the first 35."""
    return {"color": COLOURS[index % len(COLOURS)], "dashes": DASHES[index % len(DASHES)]}


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of rows x columns panels, each `width` x `height` inches; the panels in reading order."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    figure.get_layout_engine().set(wspace=0.05, hspace=0.07)  # type: ignore[union-attr, call-arg]
    panels = figure.subplots(rows, columns, squeeze=False)
    axes = [panel for row in panels for panel in row]
    for panel in axes:
        panel.grid(color="#E4E4E4", linewidth=0.7)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(which="both", labelsize=8)
        panel.xaxis.label.set_size(9)
        panel.yaxis.label.set_size(9)
    return figure, axes


def legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    """One legend for all panels."""
    handles, labels = axes.get_legend_handles_labels()
    columns = min(columns, len(labels)) or 1
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9, handlelength=3)


def save(figure: Figure, path: Path) -> Path:
    """Writes `path` (SVG, text as outlines: it looks the same everywhere) and the same as PDF, for LaTeX."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same picture is the same file.
    with matplotlib.rc_context({"svg.hashsalt": "verl_sspo", "pdf.fonttype": 42}):
        figure.savefig(path, metadata={"Date": None})
        figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
    return path
