"""The result tables of a suite, as Markdown."""

from collections.abc import Mapping, Sequence
from statistics import fmean

import pandas as pd

from verl_sspo.experiments.runs import Run, by_seed, of_seeds
from verl_sspo.experiments.suite import UNTRAINED, Measure, Suite
from verl_sspo.report.document import markdown_table
from verl_sspo.report.statistics import interquartile_mean, paired_difference
from verl_sspo.report.summary import REWARD

# A run has collapsed if the mean reward of its last rollouts, this many, is below this share of the first one's, which
# the untrained policy made. Our choice.
LAST_ROLLOUTS = 4
COLLAPSED = 0.5


def results(suite: Suite, runs: Sequence[Run], variant: str) -> str:
    """Measured and published figures: a row an algorithm, a column a measure."""
    values = {title: by_seed(runs, measure) for title, measure in suite.measures.items()}
    before = {title: by_seed(runs, measure, first=True) for title, measure in suite.measures.items()}
    published = [
        f"{title}, {each.status} [{i}]" for i, each in enumerate(suite.published, 1) for title in suite.measures
    ]
    header = ["", "seeds", *suite.measures, *(f"Δ {title}" for title in suite.measures), "collapsed", *published]
    rows = []
    external = {key: title for each in suite.published for key, title in each.rows.items()}
    names = {UNTRAINED: "before training", **{key: arm.title for key, arm in suite.algorithms.items()}, **external}
    for key, name in names.items():
        table = before if key == UNTRAINED else values
        # Before training all algorithms of a seed are the same model.
        found = {title: of_seeds(table[title], variant, None if key == UNTRAINED else key) for title in suite.measures}
        counts = max((len(each) for each in found.values()), default=0)
        cells = [_figure(list(found[title].values()), measure) for title, measure in suite.measures.items()]
        printed = [
            _printed(each.values.get(key, {}).get(title)) for each in suite.published for title in suite.measures
        ]
        paired = [""] * len(suite.measures)
        if key in suite.algorithms and key != suite.baseline:
            paired = [_paired(suite, table, found, title, variant) for title in suite.measures]
        collapsed = _collapsed(runs, variant, key) if key in suite.algorithms else ""
        if counts or any(printed):
            number = str(counts) if counts and key != UNTRAINED else ""
            rows.append([name, number, *cells, *paired, collapsed, *printed])
    return markdown_table(header, rows)


def _figure(values: Sequence[float], measure: Measure) -> str:
    estimate = interquartile_mean(values)
    return "" if estimate is None else estimate.text(*_scale(measure))


def _scale(measure: Measure) -> tuple[float, int]:
    return (100.0, 1) if measure.percent else (1.0, 3)


def _paired(
    suite: Suite,
    table: Mapping[str, pd.DataFrame],
    found: Mapping[str, dict[int, float]],
    title: str,
    variant: str,
) -> str:
    baseline = of_seeds(table[title], variant, suite.baseline)
    estimate = paired_difference(found[title], baseline)
    scale, digits = _scale(suite.measures[title])
    return "" if estimate is None else estimate.text(scale, digits, signed=True)


def _printed(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _collapsed(runs: Sequence[Run], variant: str, algorithm: str) -> str:
    """How many of the finished runs have collapsed, of those that logged at least two rollouts."""
    chosen = [r for r in runs if r.state == "finished" and (r.variant, r.algorithm) == (variant, algorithm)]
    rewards = [series for run in chosen if len(series := run.metrics.series(REWARD)[1]) > 1]
    count = sum(fmean(series[1:][-LAST_ROLLOUTS:]) < COLLAPSED * series[0] for series in rewards)
    return f"{count}/{len(rewards)}" if rewards else ""
