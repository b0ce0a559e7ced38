"""What was measured: rows for JSON, and the Markdown that shows them."""

import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

Row = dict[str, Any]


class NotMeasuredError(RuntimeError):
    """Something cannot be measured here; the message says what to do about it."""


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, and how a row fills it, for example "{q1:.2f} to {q3:.2f}"."""

    heading: str
    template: str

    def cell(self, row: Row) -> str:
        names = [name for _, name, _, _ in string.Formatter().parse(self.template) if name]
        return "-" if any(row[name] is None for name in names) else self.template.format(**row)


@dataclass(frozen=True)
class Aim:
    """A ratio that the project aims at, beside the one that was measured.

    Args:
        text: what is divided by what.
        measured: the ratio.
        limit: what it should be.
        at_least: whether the ratio should be `limit` or more; otherwise `limit` or less.
    """

    text: str
    measured: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


@dataclass(frozen=True)
class Section:
    """A table with its heading, what it says about how it was measured, its aims."""

    title: str
    note: str
    columns: Sequence[Column] = ()
    rows: Sequence[Row] = ()
    aims: Sequence[Aim] = ()

    def as_json(self) -> dict[str, Any]:
        aims = [asdict(aim) | {"met": aim.met} for aim in self.aims]
        return {"title": self.title, "note": self.note, "rows": list(self.rows), "aims": aims}

    def as_markdown(self) -> str:
        parts = [f"## {self.title}", self.note]
        if self.rows:
            cells = [[column.cell(row) for column in self.columns] for row in self.rows]
            parts.append(markdown_table([column.heading for column in self.columns], cells))
        if self.aims:
            aims = [
                [aim.text, f"{aim.measured:.2f}", f"{'≥' if aim.at_least else '≤'} {aim.limit:g}", _VERDICT[aim.met]]
                for aim in self.aims
            ]
            parts.append(markdown_table(["Aim", "measured", "aimed at", ""], aims))
        return "\n\n".join(parts)


_VERDICT = {True: "met", False: "**not met**"}


def markdown_table(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table that is also readable as text: text on the left in the first column, figures on the right."""
    rows = [list(headings), *map(list, cells)]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(headings))]
    rules = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    padded = [
        [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))] for row in rows
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in [padded[0], rules, *padded[1:]])
