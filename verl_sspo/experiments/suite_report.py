"""What the reports say and in which order."""

import itertools
import math
from collections import Counter, defaultdict
from pathlib import Path

import pandas as pd

from verl_sspo.analysis.report import losses
from verl_sspo.experiments import paired_plot, tables, training_curves
from verl_sspo.experiments.runs import Run, read_runs, read_suite
from verl_sspo.experiments.suite import Suite, expand
from verl_sspo.report.document import markdown_table, picture, write


def write_suite_report(root: Path, output: Path) -> tuple[Path, Path]:
    """The report of a suite's runs, as far as they are.

    Args:
        root: folder of the runs.
        output: folder of the report.

    Returns:
        report.md and report.html.

    Raises:
        FileNotFoundError: `root` holds no runs of a suite.
    """
    root = root.resolve()
    suite, runs = read_suite(root), read_runs(root)
    pictures = output / "pictures"
    parts = [f"# {suite.title}", f"**What it shows.** {suite.shows}", f"**What it does not show.** {suite.shows_not}"]
    parts += [progress(suite, runs), "```\n" + command(root, runs) + "\n```"]
    measured = ", ".join(f"{title} ({_meaning(suite, title)})" for title in suite.measures)
    for variant, arm in suite.variants.items():
        of_variant = f", {arm.title}" if len(suite.variants) > 1 else ""
        parts.append(f"## Results{of_variant}")
        if not any(run.variant == variant for run in runs):
            parts.append("No run has started.")
            continue
        parts.append(tables.results(suite, runs, variant))
        caption = (
            f"Interquartile mean over seeds with its 95% bootstrap interval: {measured}. Δ: mean difference to "
            f"{suite.algorithms[suite.baseline].title} over common seeds, with the interval of pairs. Collapsed: runs "
            f"whose last {tables.LAST_ROLLOUTS} rollouts have a mean reward below {tables.COLLAPSED:g} of the first "
            "rollout's. Finished runs only."
        )
        parts.append(f"*{caption}*")
        if differences := paired_plot.draw(suite, runs, variant, pictures / f"differences-{variant}.svg"):
            caption = paired_plot.CAPTION.format(baseline=suite.algorithms[suite.baseline].title)
            parts.append(picture(differences, output, f"Differences{of_variant}", caption))
        caption = (
            f"Recipe {suite.recipe}{of_variant}: mean over seeds, band: its 95% bootstrap interval; unfinished runs "
            "up to where they are. The last four panels are logged by SSPO alone."
        )
        for number, algorithms in enumerate(_groups(suite, runs, variant), 1):
            path = pictures / f"curves-{variant}-{number}.svg"
            drawn = training_curves.draw(suite, runs, variant, algorithms, path)
            parts.append(picture(drawn, output, f"Metrics over steps{of_variant}", caption))
    if suite.published:
        notes = "\n".join(f"{i}. {each.status}: {each.source}" for i, each in enumerate(suite.published, 1))
        parts.append(f"## Sources of published numbers\n\n{notes}")
    parts += losses(output)
    parts.append(f"## Versions\n\n{versions(runs)}")
    output.mkdir(parents=True, exist_ok=True)
    _write_data(suite, runs, output)
    return write(parts, output, suite.title)


def progress(suite: Suite, runs: list[Run]) -> str:
    """How far the suite is, and what failed."""
    total = len(expand(suite, "suite"))
    counts = Counter(run.state for run in runs)
    states = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    lines = [f"**State.** {len(runs)} of {total} runs started" + (f": {states}." if states else ".")]
    failed = [f"`{run.variant}/{run.algorithm}/seed{run.seed}`" for run in runs if run.state == "failed"]
    if failed:
        lines.append(f"Failed: {', '.join(failed)}.")
    return " ".join(lines)


def _groups(suite: Suite, runs: list[Run], variant: str) -> list[list[str]]:
    """The algorithms that have started, in few pictures of about as many curves, nine at most, the baseline in each."""
    started = {run.algorithm for run in runs if run.variant == variant}
    others = [key for key in suite.algorithms if key in started and key != suite.baseline]
    baseline = [suite.baseline] if suite.baseline in started else []
    pictures = max(math.ceil(len(others) / 8), 1)
    size = max(math.ceil(len(others) / pictures), 1)
    return [baseline + others[start : start + size] for start in range(0, max(len(others), 1), size)]


def command(root: Path, runs: list[Run]) -> str:
    suite = next((run.suite for run in runs), root.name)
    elsewhere = "" if suite == root.name else f" --output runs/{root.name}"
    return f"verl-sspo reproduce {suite}{elsewhere}\nverl-sspo report runs/{root.name} --output OUTPUT"


def versions(runs: list[Run]) -> str:
    """Everything that the runs ran with; several values where they differ."""
    found: dict[str, set[str]] = defaultdict(set)
    for versions_ in itertools.chain.from_iterable(run.ran_with for run in runs):
        for name, value in versions_.items():
            if value:
                found[name].add(value)
    rows = [[name, ", ".join(sorted(values))] for name, values in found.items()]
    return markdown_table(["", "version"], rows) if rows else "Nothing has run yet."


def _meaning(suite: Suite, title: str) -> str:
    measure = suite.measures[title]
    names = " and ".join(f"`{name}`" for name in measure.metrics)
    return f"{'mean over steps' if measure.summary == 'mean' else 'last value'} of {names}"


def _write_data(suite: Suite, runs: list[Run], output: Path) -> None:
    place = [{"variant": r.variant, "algorithm": r.algorithm, "seed": r.seed, "state": r.state} for r in runs]
    measured = [{title: run.value(measure) for title, measure in suite.measures.items()} for run in runs]
    pd.DataFrame([a | b for a, b in zip(place, measured, strict=True)]).to_csv(output / "runs.csv", index=False)
    drawn = {name for name in training_curves.PANELS.values() if name}
    drawn |= set(itertools.chain.from_iterable(measure.metrics for measure in suite.measures.values()))
    rows = [
        {"variant": run.variant, "algorithm": run.algorithm, "seed": run.seed, "step": step}
        | {name: data[name] for name in sorted(drawn) if name in data}
        for run in runs
        for step, data in run.metrics.steps.items()
    ]
    pd.DataFrame(rows).to_csv(output / "curves.csv.gz", index=False, compression={"method": "gzip", "mtime": 0})
