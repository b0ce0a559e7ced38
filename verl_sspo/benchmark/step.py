"""Where a training step of the quickstart spends its time, from the metrics that verl wrote."""

from pathlib import Path

from verl_sspo.benchmark.table import Column, NotMeasuredError, Row, Section
from verl_sspo.benchmark.timing import Spread
from verl_sspo.report.summary import Metrics

PREFIX = "timing_s/"
VALIDATION = PREFIX + "testing"

COLUMNS = (
    Column("part", "{part}"),
    Column("seconds", "{seconds:.3f}"),
    Column("quartiles", "{q1:.3f} to {q3:.3f}"),
    Column("of the step", "{share:.0%}"),
)


def measure(file: Path) -> list[Section]:
    """Seconds of a step and of its parts, medians over the steps but the first and those that validated.

    Args:
        file: verl's metrics of a run, as JSON lines.

    Raises:
        NotMeasuredError: there is no such file, or too few steps in it.
    """
    if not file.exists():
        raise NotMeasuredError(f"there is no {file}: run verl_sspo.quickstart first, or name another file of metrics")
    steps = [data for data in Metrics.read(file).steps.values() if PREFIX + "step" in data][1:]
    steps = [data for data in steps if VALIDATION not in data]
    if len(steps) < 2:
        raise NotMeasuredError(f"{file} has {len(steps)} steps after the first that did not validate: 2 are needed")
    note = f"Medians over {len(steps)} steps, without the first and those that validated; from the metrics of the run."
    return [Section("Quickstart, a training step", note, COLUMNS, rows_of(steps))]


def rows_of(steps: list[dict[str, float]]) -> list[Row]:
    """The step, its parts by size, and the rest of it; verl times parts of parts under names with a slash."""
    names = sorted({name for data in steps for name in data if name.startswith(PREFIX) and name.count("/") == 1})
    parts = {name.removeprefix(PREFIX): [data.get(name, 0.0) for data in steps] for name in names}
    total = parts.pop("step")
    rest = [whole - sum(part[i] for part in parts.values()) for i, whole in enumerate(total)]
    spreads = {name: Spread.of(values) for name, values in parts.items()}
    ordered = sorted(spreads.items(), key=lambda item: -item[1].median)
    step = Spread.of(total)
    return [
        {"part": name, "seconds": s.median, "q1": s.q1, "q3": s.q3, "rounds": s.rounds, "share": s.median / step.median}
        for name, s in [("step", step), *ordered, ("rest", Spread.of(rest))]
    ]
