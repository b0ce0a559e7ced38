"""The look of all pictures: one palette, lines that differ in colour and dashes, SVG and PDF for print."""

from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Safe for colour blindness: Okabe and Ito's colours without yellow, which is too light on paper, then three of Paul
# Tol's "muted" ones.
BLACK, BLUE, ORANGE, GREEN, PURPLE = "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7"
COLOURS = (BLACK, BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9", "#332288", "#882255", "#999933")
GREY, LIGHT_GREY = "#767676", "#E4E4E4"
# Cycled, so that neighbouring curves differ in colour and dashes.
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 1.5), (1, 1.2), (7, 1.5, 1, 1.5))
MARKERS = "osD^vPX<>*"


def line(index: int) -> dict[str, Any]:
    """Colour and dashes of the index-th curve of a picture, of at most ten."""
    return {"color": COLOURS[index], "dashes": DASHES[index % len(DASHES)]}


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of rows x columns panels, each `width` x `height` inches; the panels in reading order."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    figure.get_layout_engine().set(wspace=0.05, hspace=0.07)  # type: ignore[union-attr, call-arg]
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in axes:
        panel.grid(color=LIGHT_GREY, linewidth=0.7)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(which="both", labelsize=8)
        panel.xaxis.label.set_size(9)
        panel.yaxis.label.set_size(9)
    return figure, axes


def draw_curves(panel: Axes, table: pd.DataFrame, markers: bool = False) -> None:
    """Draws a line per column over the index, with about a dozen markers each if `markers`."""
    every = max(1, len(table) // 12)
    for index, (name, values) in enumerate(table.items()):
        look = line(index) | {"linewidth": 1.6, "label": name}
        if markers:
            look |= {"marker": MARKERS[index], "markevery": (index % every, every), "markersize": 4}
            look |= {"markerfacecolor": "none"}
        panel.plot(values, **look)


def label(panel: Axes, title: str, x: str) -> None:
    """Sets the title of a panel and of its horizontal axis."""
    panel.set_title(title, loc="left", fontsize=10)
    panel.set_xlabel(x)


def legend_below(figure: Figure, columns: int) -> None:
    """Adds one legend for all panels, with every label once."""
    found: dict[str, Any] = {}
    for panel in figure.axes:
        handles, labels = panel.get_legend_handles_labels()
        found |= {label: handle for label, handle in zip(labels, handles, strict=True) if label not in found}
    columns = min(columns, len(found)) or 1
    look: dict[str, Any] = {"loc": "outside lower center", "frameon": False, "fontsize": 9, "handlelength": 3}
    figure.legend(list(found.values()), list(found), ncols=columns, **look)


def save(figure: Figure, path: Path) -> Path:
    """Writes `path`, with the same bytes for the same picture. An SVG is also written as PDF, for LaTeX."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "verl_sspo", "pdf.fonttype": 42}):
        if path.suffix == ".svg":
            figure.savefig(path, metadata={"Date": None})
            figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
        else:
            figure.savefig(path, dpi=160)
    return path


def picture(path: Path, output: Path, alt: str, caption: str) -> str:
    """Markdown of a picture and its caption, for a report in the folder `output`."""
    return f"![{alt}]({path.relative_to(output)})\n\n*{caption}*"
