"""Turns the rows of a source into verl's rows, and reports which it left out and why."""

from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from verl_sspo.data.schema import make_row
from verl_sspo.data.sources import Row

SHOWN = 3  # bad rows shown of each kind


class Dropped(Exception):
    """A row that a task leaves out on purpose; the message says why."""


@dataclasses.dataclass(frozen=True)
class Example:
    """The content of a row of a source."""

    problem: str
    ground_truth: str
    data_source: str | None = None  # if the row has its own instead of its task's


@dataclasses.dataclass(frozen=True)
class Task:
    """One data set."""

    source: str  # id on the Hugging Face hub
    data_source: str  # name for the reward
    read: Callable[..., Example]
    ability: str = "math"
    config: str | None = None
    splits: tuple[str, ...] = ("test",)
    template: str = "boxed"


@dataclasses.dataclass
class Split:
    """Rows made from one split of a source; also which were dropped, bad or repeated."""

    name: str
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)  # reason: how many
    # Rows that cannot be used, and rows that repeat a problem: place, what is wrong.
    bad: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    repeated: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def summary(self) -> str:
        """What was kept and left out, in a few lines."""
        lengths = [sum(len(message["content"]) for message in row["prompt"]) for row in self.rows]
        lines = [f"{self.name}: {len(self.rows)} rows, the longest prompt has {max(lengths, default=0)} characters"]
        return "\n".join(lines + [f"  left out: {count} ({why})" for why, count in sorted(self.dropped.items())])


def listed(found: list[tuple[str, str]]) -> str:
    """Rows grouped by reason (the words before its colon), each group with a count and its first places."""
    kinds = defaultdict(list)
    for place, reason in found:
        kinds[reason.partition(":")[0]].append(f"    {place}: {reason}")
    lines = []
    for kind, places in sorted(kinds.items()):
        lines += [f"  {len(places)} x {kind}", *places[:SHOWN]]
        lines += [f"    and {len(places) - SHOWN} more"] if len(places) > SHOWN else []
    return "\n".join(lines)


def column_of(row: dict[str, Any], *names: str) -> str:
    """The first of the columns that is not null.

    Raises:
        ValueError: There is none.
    """
    there = [name for name in names if name in row]
    if not there:
        raise ValueError(f"no column {' or '.join(names)}, only {', '.join(map(str, row))}")
    found = next((name for name in there if row[name] is not None), None)
    if found is None:
        raise ValueError(f"column {there[0]} is null")
    return found


def text_of(row: dict[str, Any], *names: str) -> str:
    """The text in the first of the columns that is not null.

    Raises:
        ValueError: There is none, or it is not text, or it is empty.
    """
    column = column_of(row, *names)
    if not isinstance(row[column], str):
        raise ValueError(f"column {column} is not text: {row[column]!r:.80}")
    if not row[column].strip():
        raise ValueError(f"column {column} is empty")
    return row[column].strip()


def make_split(
    task: Task,
    rows: list[Row],
    name: str,
    read: Callable[[dict[str, Any]], Example],
    template: list[dict[str, str]],
    keep_repeated: bool,
) -> Split:
    """Turns the rows of a source into verl's, in their order.

    Args:
        task: The data set.
        rows: Rows of `open_source`.
        name: Name of the split.
        read: Reads one row; raises `Dropped` for a row to leave out, ValueError for one that cannot be used.
        template: Chat messages, in which `{problem}` stands for the problem.
        keep_repeated: Keep rows that repeat the problem of an earlier row.
    """
    split = Split(name)
    first: dict[str, str] = {}
    for index, (place, row) in enumerate(tqdm(rows, desc=f"{task.data_source} {name}", unit="row", leave=False)):
        try:
            if isinstance(row, ValueError):
                raise row
            if not isinstance(row, dict):
                raise ValueError(f"not an object: {row!r:.80}")
            example = read(row)
            if re.search("[\ud800-\udfff]", example.problem + example.ground_truth):
                raise ValueError("half a character (lone surrogate), which cannot be written")
            if first.setdefault(example.problem, place) != place:
                split.repeated.append((place, f"repeats a problem: {first[example.problem]}"))
                if not keep_repeated:
                    continue
            content = [each | {"content": each["content"].replace("{problem}", example.problem)} for each in template]
            split.rows.append(
                make_row(
                    data_source=example.data_source or task.data_source,
                    prompt=content,
                    ability=task.ability,
                    ground_truth=example.ground_truth,
                    split=name,
                    index=index,
                )
            )
        except Dropped as reason:
            split.dropped[str(reason)] += 1
        except ValueError as error:
            split.bad.append((place, str(error)))
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            split.bad.append((place, f"not in the task's format: {type(error).__name__}: {error}"[:200]))
    return split


def mix(splits: list[Split], seed: int) -> Split:
    """One split with as many rows of each as the smallest has, drawn and shuffled with the seed."""
    count, generator = min(len(split.rows) for split in splits), random.Random(seed)
    mixed = Split(splits[0].name)
    for split in splits:
        mixed.rows += generator.sample(split.rows, count)
        mixed.dropped += split.dropped
        if count < len(split.rows):
            mixed.dropped[f"more rows of {split.rows[0]['data_source']} than of the other"] += len(split.rows) - count
    generator.shuffle(mixed.rows)
    return mixed
