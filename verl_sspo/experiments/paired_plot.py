"""Differences to the baseline, seed by seed: what is left when the luck that the algorithms share is taken out."""

from collections.abc import Sequence
from pathlib import Path

from verl_sspo.experiments.runs import Run, by_seed, of_seeds
from verl_sspo.experiments.suite import Suite
from verl_sspo.report import style
from verl_sspo.report.statistics import paired_difference

CAPTION = (
    "Difference of each run to the run of {baseline} with the same seed: a small dot a seed, the mean with its 95% "
    "bootstrap interval over pairs. Right of the line: better than {baseline}."
)


def draw(suite: Suite, runs: Sequence[Run], variant: str, path: Path) -> Path | None:
    """A row an algorithm, a panel a measure; None while no seed has finished with the baseline and another."""
    others = [key for key in suite.algorithms if key != suite.baseline]
    tables = {title: by_seed(runs, measure) for title, measure in suite.measures.items()}
    baseline = {title: of_seeds(table, variant, suite.baseline) for title, table in tables.items()}
    shown = [
        key
        for key in others
        if any(of_seeds(table, variant, key).keys() & baseline[title].keys() for title, table in tables.items())
    ]
    if not shown:
        return None
    figure, panels = style.new_figure(1, len(suite.measures), 3.6, 0.7 + 0.27 * len(shown))
    for panel, (title, measure) in zip(panels, suite.measures.items(), strict=True):
        scale = 100 if measure.percent else 1
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_xlabel(f"difference to {suite.algorithms[suite.baseline].title}" + ", points" * measure.percent)
        panel.axvline(0, color="#767676", linewidth=1)
        panel.set_yticks(
            range(len(shown)), [suite.algorithms[key].title for key in shown] if panel is panels[0] else []
        )
        panel.set_ylim(len(shown) - 0.5, -0.5)
        for row, key in enumerate(shown):
            values = of_seeds(tables[title], variant, key)
            if (estimate := paired_difference(values, baseline[title])) is None:
                continue
            differences = [scale * (values[seed] - baseline[title][seed]) for seed in values.keys() & baseline[title]]
            panel.plot(differences, [row] * len(differences), "o", color="#767676", markersize=3, alpha=0.6)
            low, high = (estimate.value if end is None else end for end in (estimate.low, estimate.high))
            interval = [[scale * (estimate.value - low)], [scale * (high - estimate.value)]]
            panel.errorbar(
                [scale * estimate.value], [row], xerr=interval, fmt="D", markersize=5, color="#0072B2", linewidth=1.8
            )
    return style.save(figure, path)
