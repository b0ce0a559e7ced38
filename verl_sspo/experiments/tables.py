"""The result tables of a suite, as Markdown."""

import pandas as pd

from verl_sspo.experiments.results import Results
from verl_sspo.experiments.suite import UNTRAINED, Measure


def measured_table(results: Results, variant: str) -> str:
    """Measured and published figures as Markdown: a row per algorithm, a column per measure."""
    suite = results.suite
    names = {UNTRAINED: "before training", **{key: arm.title for key, arm in suite.algorithms.items()}}
    names |= {key: title for published in suite.published for key, title in published.rows.items()}
    table, seeds = pd.DataFrame(index=list(names)), pd.Series(0, index=list(names))
    for title, measure in suite.measures.items():
        values = results.values(measure, variant)
        # Before training, all algorithms of a seed have the same model.
        values[UNTRAINED] = results.values(measure, variant, first=True).mean(axis=1)
        table[title] = values.apply(_mean_and_range, measure=measure)
        seeds = values.count().combine(seeds, max, fill_value=0)
    table.insert(0, "seeds", seeds.astype(str).replace("0", ""))
    table["collapsed"] = [results.collapsed(variant, key) for key in names]
    for number, each in enumerate(suite.published, 1):
        for title in suite.measures:
            printed = {key: values.get(title) for key, values in each.values.items()}
            table[f"{title}, {each.status} [{number}]"] = pd.Series(printed, dtype=float).dropna().map("{:g}".format)
    table = table.fillna("")
    table = table[(table.drop(columns="collapsed") != "").any(axis=1)]
    return table.rename(index=names).rename_axis("").reset_index().to_markdown(index=False, disable_numparse=True)


def _mean_and_range(values: pd.Series, measure: Measure) -> str:
    values = values.dropna()
    if values.empty:
        return ""
    scale, digits = (100, 1) if measure.percent else (1, 3)
    mean, low, high = (f"{scale * each:.{digits}f}" for each in (values.mean(), values.min(), values.max()))
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean


def differences_table(results: Results, variant: str) -> str:
    """Differences to the baseline as Markdown; empty until a seed has finished the baseline and another algorithm."""
    suite, (_, table) = results.suite, results.differences(variant)
    rows = []
    for (title, key), row in table.iterrows():
        digits = 1 if suite.measures[title].percent else 3
        several = row["seeds"] > 1

        def interval(low: float, high: float, several: bool = several, digits: int = digits) -> str:
            return f"[{low:+.{digits}f}, {high:+.{digits}f}]" if several else ""

        rows.append(
            {
                "measure": title,
                "": suite.algorithms[key].title,
                "seeds ahead": f"{row['ahead']:.0f} of {row['seeds']:.0f}",
                "mean Δ": f"{row['mean']:+.{digits}f}",
                "95 %, this one": interval(row["low"], row["high"]),
                "95 %, all at once": interval(row["low_all"], row["high_all"]),
                "p, Holm": f"{row['p_all']:.3f}" if several else "",
                "p, signs": f"{row['p_sign']:.3f}" if several else "",
            }
        )
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True) if rows else ""
