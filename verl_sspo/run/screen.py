"""What the user sees during training: a progress bar and one line per step, at most 80 columns wide."""

import time

import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from verl_sspo.report.summary import accuracy

COLUMNS = (("step", 11), ("reward", 9), ("validation", 11), ("entropy", 9), ("seconds", 9), ("time left", 11))


def clock(seconds: float) -> str:
    """A duration as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def say(console: Console, text: str, style: str = "") -> None:
    """Prints a text unchanged: without markup, and without line breaks that would split paths."""
    console.print(Text(text, style=style), soft_wrap=True)


class Screen:
    """Progress of one start of main_ppo.

    Args:
        console: shows a bar and lines in a terminal, otherwise only lines.
        total: number of training steps, if known before verl prints it.
    """

    def __init__(self, console: Console, total: int | None = None) -> None:
        self.console = console
        self.total = total
        self.started = time.monotonic()
        # When the first step of this start began, and how many steps came before it.
        self.began: tuple[float, int] | None = None
        self.has_header = False
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self.task = self.progress.add_task("starting", total=None, left="")

    def __enter__(self) -> "Screen":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def phase(self, text: str) -> None:
        """Shows what verl is doing before the first step."""
        self.progress.update(self.task, description=text)
        if not self.console.is_terminal:
            say(self.console, f"[{clock(time.monotonic() - self.started)}] {text}")

    def step(self, step: int, data: dict[str, float]) -> None:
        """Prints the metrics of a step in one line; step 0 is the validation before training."""
        left = None
        if step > 0:
            now, seconds = time.monotonic(), data.get("timing_s/step", 0.0)
            if self.began is None:
                self.began = now - seconds, step - 1
            at, before = self.began
            if self.total:
                left = (now - at) / max(step - before, 1) * max(self.total - step, 0)
        cells = (
            f"{step}/{self.total}" if self.total else f"{step}",
            _number(data.get("critic/score/mean")),
            _number(next(iter(accuracy(pd.DataFrame([data]))), None)),
            _number(data.get("actor/entropy")),
            _number(data.get("timing_s/step"), 1),
            "" if left is None else clock(left),
        )
        if not self.has_header:
            self.has_header = True
            say(self.console, "".join(name.rjust(width) for name, width in COLUMNS))
        say(self.console, "".join(cell.rjust(width) for cell, (_, width) in zip(cells, COLUMNS, strict=True)).rstrip())
        self.progress.update(
            self.task,
            description="training" if step else "step 1",
            completed=step,
            total=self.total,
            left="" if left is None else f"{clock(left)} left",
        )


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"
