"""The result tables of a suite, as Markdown."""

import numpy as np
import pandas as pd

from verl_sspo.experiments.results import Results
from verl_sspo.experiments.suite import UNTRAINED, Measure


def measured_table(results: Results, variant: str) -> str:
    """Measured and published figures as Markdown: a row per algorithm, a column per measure."""
    suite = results.suite
    measures = suite.measures.items()
    trained = {title: results.values(measure, variant) for title, measure in measures}
    # Before training all algorithms of a seed are the same model.
    before = {
        title: results.values(measure, variant, first=True).mean(axis=1).to_frame(UNTRAINED)
        for title, measure in measures
    }
    external = {key: title for published in suite.published for key, title in published.rows.items()}
    names = {UNTRAINED: "before training", **{key: arm.title for key, arm in suite.algorithms.items()}, **external}
    rows = []
    for key, name in names.items():
        found = {
            title: (before if key == UNTRAINED else trained)[title].get(key, pd.Series(dtype=float)).dropna()
            for title in suite.measures
        }
        printed = {
            f"{title}, {each.status} [{i}]": ""
            if (value := each.values.get(key, {}).get(title)) is None
            else f"{value:g}"
            for i, each in enumerate(suite.published, 1)
            for title in suite.measures
        }
        seeds = max(map(len, found.values()))
        if seeds or any(printed.values()):
            cells = {title: _mean_and_range(found[title], measure) for title, measure in measures}
            ended = {"collapsed": results.collapsed(variant, key)}
            rows.append({"": name, "seeds": str(seeds or "")} | cells | ended | printed)
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def _mean_and_range(values: pd.Series, measure: Measure) -> str:
    if values.empty:
        return ""
    scale, digits = (100, 1) if measure.percent else (1, 3)
    mean, low, high = (f"{scale * each:.{digits}f}" for each in (values.mean(), values.min(), values.max()))
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean


def differences_table(results: Results, variant: str) -> str:
    """The differences to the baseline as Markdown; empty while no seed has finished with the baseline and another."""
    suite, (_, table) = results.suite, results.differences(variant)
    rows = []
    for (title, key), row in table.iterrows():
        digits = 1 if suite.measures[title].percent else 3
        low, high, low_all, high_all = (
            "" if np.isnan(each) else f"{each:+.{digits}f}" for each in row[["low", "high", "low_all", "high_all"]]
        )
        rows.append(
            {
                "measure": title,
                "": suite.algorithms[key].title,
                "seeds ahead": f"{row['ahead']:.0f} of {row['seeds']:.0f}",
                "mean Δ": f"{row['mean']:+.{digits}f}",
                "95 %, this one": f"[{low}, {high}]" if low else "",
                "95 %, all at once": f"[{low_all}, {high_all}]" if low else "",
                "p, Holm": "" if np.isnan(row["p_all"]) else f"{row['p_all']:.3f}",
                "p, signs": "" if np.isnan(row["p_sign"]) else f"{row['p_sign']:.3f}",
            }
        )
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True) if rows else ""
