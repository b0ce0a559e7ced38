"""Runs the cells of a suite, some side by side, and shows how far they are."""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from verl_sspo.experiments import cell as cells_
from verl_sspo.experiments.suite import Cell
from verl_sspo.run import launch

# Exit status of a cell's process that found another one at work.
_BUSY = 75


@dataclass
class Outcome:
    """How the cells of a run of `reproduce` ended, by name."""

    finished: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    busy: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass
class _Running:
    cell: Cell
    folder: Path
    process: BaseProcess
    started: float
    total: int | None = None

    def steps(self) -> tuple[int, int | None]:
        """Training steps done, and those there are in all as soon as verl has said so."""
        attempts = cells_.attempts(self.folder)
        if not attempts:
            return 0, None
        log, metrics = attempts[-1] / launch.LOG, attempts[-1] / launch.METRICS
        if self.total is None and log.exists():
            match = launch.TOTAL_STEPS.search(log.read_text(encoding="utf-8", errors="replace"))
            self.total = int(match[1]) if match else None
        step = 0
        if metrics.exists():
            complete = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
            step = json.loads(complete[-1])["step"] if complete else 0
        return step, self.total

    def done(self) -> float:
        """The share of the cell that is done, by its steps."""
        step, total = self.steps()
        return min(step / total, 1.0) if total else 0.0


def run(
    cells: Sequence[Cell],
    root: Path,
    recipes: Path,
    *,
    jobs: int = 1,
    console: Console | None = None,
    train: cells_.Trainer = launch.train,
    poll_seconds: float = 1.0,
) -> Outcome:
    """Runs every cell that is not finished, each in a process of its own. The failure of one does not stop the others.

    Args:
        cells: what to run, in this order.
        root: folder of the suite's runs; the cells' folders are below.
        recipes: Hydra tree of the recipes.
        jobs: cells side by side. Each then has the CPU cores divided by `jobs` as threads.
        console: where the progress goes, stderr without it.
        train: what runs main_ppo; a function of a module, since it is called in another process.
        poll_seconds: how often the progress is looked at.

    Raises:
        KeyboardInterrupt: on SIGINT, SIGTERM or SIGHUP, after the running cells have ended their processes.
    """
    console = console or Console(stderr=True)
    outcome = Outcome()
    pending = []
    for cell in cells:
        if cells_.state(root / cell.name) == "finished":
            outcome.skipped.append(cell.name)
        else:
            pending.append(cell)
    if outcome.skipped:
        console.print(f"{len(outcome.skipped)} of {len(cells)} cells are finished already", highlight=False)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    display = _Display(console, len(pending), jobs)
    running: list[_Running] = []
    with launch.signals_interrupt():
        try:
            with display.progress:
                while pending or running:
                    while pending and len(running) < jobs:
                        running.append(_start(pending.pop(0), root, recipes, train, threads))
                        display.started(running[-1])
                    time.sleep(poll_seconds)
                    for each in [each for each in running if not each.process.is_alive()]:
                        running.remove(each)
                        _take_outcome(each, outcome)
                        display.ended(each, outcome)
                    display.update(running)
        finally:
            for each in running:
                each.process.terminate()
            for each in running:
                each.process.join()
    return outcome


def _start(cell: Cell, root: Path, recipes: Path, train: cells_.Trainer, threads: int) -> _Running:
    folder = root / cell.name
    # A fork of a fresh interpreter: no state of this one, its own main thread for launch's signal handlers, and the
    # imports are paid once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["verl_sspo.experiments.cell", "verl_sspo.quickstart.model"])
    process = context.Process(target=_run_in_process, args=(cell, folder, recipes, train, threads), name=cell.name)
    process.start()
    return _Running(cell, folder, process, time.monotonic())


def _run_in_process(cell: Cell, folder: Path, recipes: Path, train: cells_.Trainer, threads: int) -> None:
    # Ctrl-C in the terminal then reaches `run` alone, which ends the cells in order.
    os.setsid()
    threading.Thread(target=_end_with_the_runner, daemon=True).start()
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    try:
        cells_.run_cell(cell, folder, recipes, train)
    except cells_.CellRunningError:
        sys.exit(_BUSY)
    except Exception as error:
        cells_.record_failure(folder, error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _end_with_the_runner() -> None:
    """Ends this cell once the process that runs the suite is gone without having done so."""
    if (runner := multiprocessing.parent_process()) is not None:
        runner.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _take_outcome(each: _Running, outcome: Outcome) -> None:
    name, code = each.cell.name, each.process.exitcode
    failure = each.folder / cells_.FAILURE
    if code == 0:
        outcome.finished.append(name)
    elif code == _BUSY:
        outcome.busy.append(name)
    elif code == 1 and failure.exists():
        outcome.failed[name] = json.loads(failure.read_text())["error"]
    else:
        outcome.failed[name] = f"its process ended with status {code}, see {each.folder / cells_.LOG}"


class _Display:
    """A bar for the suite and one for each running cell in a terminal; a line an event elsewhere."""

    def __init__(self, console: Console, count: int, jobs: int) -> None:
        self.console = console
        self.count = count
        self.jobs = jobs
        self.ended_cells = 0
        self.seconds: list[float] = []
        self.began = time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self.overall = self.progress.add_task("suite", total=count, note="")
        self.tasks: dict[str, Any] = {}

    def started(self, each: _Running) -> None:
        self.tasks[each.cell.name] = self.progress.add_task(each.cell.name, total=None, note="starting")
        if not self.console.is_terminal:
            self._line(f"{each.cell.name} started, log: {each.folder / cells_.LOG}")

    def ended(self, each: _Running, outcome: Outcome) -> None:
        name = each.cell.name
        self.progress.remove_task(self.tasks.pop(name))
        self.ended_cells += 1
        seconds = time.monotonic() - each.started
        if name in outcome.failed:
            text = f"{name} FAILED after {seconds:.0f} s: {outcome.failed[name]}"
        elif name in outcome.busy:
            text = f"{name} is being run by another process, left to it"
        else:
            self.seconds.append(seconds)
            text = f"{name} finished in {seconds:.0f} s"
        left = f"; {self.count - self.ended_cells} left, {self.time_left([])}" if self.count > self.ended_cells else ""
        self._line(text + left)

    def update(self, running: list[_Running]) -> None:
        for each in running:
            step, total = each.steps()
            note = f"step {step}" if step else "starting"
            self.progress.update(self.tasks[each.cell.name], completed=step, total=total, note=note)
        done = self.ended_cells + sum(each.done() for each in running)
        self.progress.update(self.overall, completed=int(done), note=self.time_left(running))

    def time_left(self, running: list[_Running]) -> str:
        """By the mean duration of the cells so far; until one has finished, by the share of the running ones."""
        remaining = self.count - self.ended_cells - sum(each.done() for each in running)
        if self.seconds:
            seconds = sum(self.seconds) / len(self.seconds) * remaining / min(self.jobs, max(remaining, 1))
        else:
            done = self.ended_cells + sum(each.done() for each in running)
            if not done:
                return "time left unknown"
            seconds = (time.monotonic() - self.began) / done * remaining
        minutes = int(seconds / 60 + 0.5)
        return f"about {minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"about {max(minutes, 1)} min"

    def _line(self, text: str) -> None:
        self.console.print(f"[{self.ended_cells}/{self.count}] {text}", markup=False, highlight=False, soft_wrap=True)
