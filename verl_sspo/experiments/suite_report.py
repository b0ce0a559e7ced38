"""Writes the report of a suite's runs, section by section."""

import itertools
import math
import os
import shlex
from pathlib import Path

import numpy as np
import pandas as pd

from verl_sspo.compose import RECIPES
from verl_sspo.experiments import figures, staleness
from verl_sspo.experiments.results import COLLAPSED, LAST_ROLLOUTS, PLACE, Results, read_results
from verl_sspo.experiments.suite import expand
from verl_sspo.experiments.tables import differences_table, measured_table
from verl_sspo.report.statistics import LEVEL, simulated_coverage, simultaneous_level
from verl_sspo.report.style import picture


def write_suite_report(root: Path, output: Path) -> Path:
    """Writes the report of the runs below `root`, finished or not, and returns its report.md.

    Raises:
        FileNotFoundError: `root` holds no runs of a suite.
    """
    results = read_results(root)
    suite, pictures = results.suite, output / "pictures"
    parts = [f"# {suite.title}", f"**What it shows.** {suite.shows}", f"**What it does not show.** {suite.shows_not}"]
    parts += [progress(results), f"```\n{commands(root, results)}\n```"]
    for variant, arm in suite.variants.items():
        of_variant = f", {arm.title}" if len(suite.variants) > 1 else ""
        parts.append(f"## Results{of_variant}")
        present = set(results.runs.loc[results.runs["variant"] == variant, "algorithm"])
        started = [key for key in suite.algorithms if key in present]
        if not started:
            parts.append("No run has started.")
            continue
        if table := measured_table(results, variant):
            parts += [table, f"*{measured_note(results)}*"]
        if table := differences_table(results, variant):
            path = figures.draw_differences(results, variant, pictures / f"differences-{variant}.svg")
            caption = (
                f"Difference of each run to the run of {suite.algorithms[suite.baseline].title} with the same seed. "
                "Right of the line: more. Intervals that are wider than the panel end at its edge."
            )
            parts += [table, f"*{differences_note(results, variant)}*"]
            parts.append(picture(path, output, f"Differences{of_variant}", caption))
        for number, algorithms in enumerate(grouped(started, suite.baseline), 1):
            path = figures.draw_curves(results, variant, algorithms, pictures / f"curves-{variant}-{number}.svg")
            caption = (
                f"Recipe {suite.recipe}{of_variant}: mean over seeds, unfinished runs included as far as they are. "
                "Seeds differ in their problems, and some also in their first model, so their spread is not drawn: "
                "differences are measured seed by seed above. The last four panels are logged by SSPO alone."
            )
            parts.append(picture(path, output, f"Metrics over steps{of_variant}", caption))
    if suite.staleness:
        parts += staleness.sections(results, output)
    if suite.published:
        notes = "\n".join(f"{i}. {each.status}: {each.source}" for i, each in enumerate(suite.published, 1))
        parts.append(f"## Sources of published numbers\n\n{notes}")
    parts.append(f"## Versions\n\n{versions(results)}")
    output.mkdir(parents=True, exist_ok=True)
    write_data(results, output)
    (output / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return output / "report.md"


def progress(results: Results) -> str:
    """How many runs are in each state, and which have failed."""
    runs, total = results.runs, len(expand(results.suite, "suite"))
    states = ", ".join(f"{count} {state}" for state, count in runs["state"].value_counts().items())
    failed = [f"`{r.variant}/{r.algorithm}/seed{r.seed}`" for r in runs[runs["state"] == "failed"].itertuples()]
    text = f"**State.** {len(runs)} of {total} runs started" + (f": {states}." if states else ".")
    return text + (f" Failed: {', '.join(failed)}." if failed else "")


def commands(root: Path, results: Results) -> str:
    """The shell commands that make these runs and this report."""
    shown = os.path.relpath(root)
    name = next(iter(results.runs["suite"]), root.name)
    # A user's own suite is named by its copy beside the runs.
    suite = name if (RECIPES / "suites" / f"{name}.yaml").exists() else f"{shown}/suite.yaml"
    output = [] if shown == f"runs/{suite}" else ["--output", shown]
    lines = (["reproduce", suite, *output], ["report", shown, "--output", f"{shown}/report"])
    return "\n".join(shlex.join(["verl-sspo", *words]) for words in lines)


def measured_note(results: Results) -> str:
    """Explains the table of measured figures."""
    kinds = {"mean": "mean over steps", "last": "last value"}
    measures = (
        f"{title} ({kinds[measure.summary]} of {' and '.join(f'`{name}`' for name in measure.metrics)})"
        for title, measure in results.suite.measures.items()
    )
    return (
        f"Mean over seeds (lowest to highest), finished runs only: {', '.join(measures)}. Collapsed: runs whose last "
        f"{LAST_ROLLOUTS} rollouts have a mean reward below {COLLAPSED:g} of the first rollout's."
    )


def differences_note(results: Results, variant: str) -> str:
    """Explains intervals and tests of the differences, with their simulated coverage."""
    _, table = results.differences(variant)
    comparisons, seeds = int((table["seeds"] > 1).sum()), int(table["seeds"].max())
    baseline = results.suite.algorithms[results.suite.baseline].title
    note = f"Δ: difference to {baseline} over common seeds. "
    if not comparisons:
        return note + "One seed has no interval."
    one, all_ = (simulated_coverage(seeds, level) for level in (LEVEL, simultaneous_level(comparisons)))
    alone = ", ".join(f"{100 * value:.0f} % of {kind}" for kind, value in one.items())
    together = ", ".join(f"{100 * value**comparisons:.0f} % ({kind})" for kind, value in all_.items())
    return note + (
        f"Intervals: paired t; the second one holds for all {comparisons} comparisons of this table at once "
        f"(Bonferroni). p, Holm: paired t test, corrected for the {comparisons} comparisons by Holm's method. p, "
        "signs: exact two-sided sign-flip test, which assumes nothing about the distribution, not corrected; with "
        f"{seeds} seeds it cannot be below 1/{2 ** (seeds - 1)}"
        + (", so that no sign pattern alone is significant at 5 %. " if seeds < 6 else ". ")
        + "Simulated "
        f"coverage with {seeds} seeds: the interval of one comparison holds the true mean in {alone} differences; all "
        f"{comparisons} intervals hold theirs at once, were they independent, in {together}. An interval that excludes "
        "0 thus rests on differences that are about normal."
    )


def grouped(algorithms: list[str], baseline: str) -> list[list[str]]:
    """Splits algorithms into as few pictures as possible, at most nine curves in each, the baseline in all."""
    others = [key for key in algorithms if key != baseline]
    parts = np.array_split(others, max(1, math.ceil(len(others) / 8)))
    return [[key for key in algorithms if key == baseline or key in part] for part in parts]


def versions(results: Results) -> str:
    """The versions that the runs used; several values where they differ."""
    used = pd.DataFrame(itertools.chain.from_iterable(results.runs["versions"]))
    rows = {name: ", ".join(sorted(map(str, values.dropna().unique()))) for name, values in used.items()}
    return pd.Series(rows, name="version").to_markdown() if rows else "Nothing has run yet."


def write_data(results: Results, output: Path) -> None:
    """Writes runs.csv, a row per run; differences.csv, the tables of differences; curves.csv.gz, what is drawn."""
    suite = results.suite
    measured = results.runs[[*PLACE, "state"]]
    for title, measure in suite.measures.items():
        values = {variant: results.values(measure, variant).stack() for variant in suite.variants}
        column = pd.concat(values, names=["variant"]).rename(title)
        measured = measured.merge(column.reset_index(), how="left", on=PLACE)
    measured.to_csv(output / "runs.csv", index=False)
    compared = {variant: results.differences(variant)[1] for variant in suite.variants}
    names = ["variant", "measure", "algorithm"]
    pd.concat(compared, names=names).to_csv(output / "differences.csv", float_format="%.5g")
    drawn = {*figures.PANELS.values(), *itertools.chain.from_iterable(m.metrics for m in suite.measures.values())}
    curves = results.steps[[*PLACE, "step", *sorted(name for name in results.steps if name in drawn)]]
    curves.to_csv(output / "curves.csv.gz", index=False, compression={"method": "gzip", "mtime": 0})
