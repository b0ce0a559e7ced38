"""Runs the cells of a suite, several at a time, each in its own process."""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from rich.console import Console

from verl_sspo.experiments import cell as cells_
from verl_sspo.experiments.suite import Cell
from verl_sspo.run import launch
from verl_sspo.run.screen import clock, say

# Exit status of a cell's process if another process is running the cell.
_BUSY = 75


@dataclass
class Outcome:
    """The names of the cells, by how they ended."""

    finished: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    busy: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def run(
    cells: Sequence[Cell],
    root: Path,
    recipes: Path,
    *,
    jobs: int = 1,
    console: Console | None = None,
    train: cells_.Trainer = launch.train,
) -> Outcome:
    """Runs every unfinished cell, each in its own process. If one fails, the others continue.

    Args:
        cells: what to run, in this order.
        root, recipes: folder of the suite's runs, and Hydra config folder of the recipes.
        jobs: cells to run at a time. Each gets as many threads as CPU cores divided by `jobs`.
        console: where to show progress; default: stderr.
        train: module-level function that runs main_ppo; it is called in another process.

    Raises:
        KeyboardInterrupt: on SIGINT, SIGTERM or SIGHUP, after the running cells have ended their processes.
    """
    console = console or Console(stderr=True)
    outcome = Outcome(skipped=[cell.name for cell in cells if cells_.state(root / cell.name) == "finished"])
    pending = [cell for cell in cells if cell.name not in outcome.skipped]
    total, begin = len(pending), time.monotonic()
    running: dict[str, tuple[BaseProcess, float]] = {}
    with launch.signals_interrupt():
        try:
            while pending or running:
                while pending and len(running) < jobs:
                    cell = pending.pop(0)
                    running[cell.name] = _start(cell, root / cell.name, recipes, train, jobs), time.monotonic()
                    say(console, f"{cell.name} started, log: {root / cell.name / cells_.LOG}")
                connection.wait([process.sentinel for process, _ in running.values()])
                for name, (process, started) in list(running.items()):
                    if not process.is_alive():
                        del running[name]
                        text = _take_outcome(name, root / name, process.exitcode, outcome)
                        left = len(pending) + len(running)
                        done = total - left
                        estimate = f", about {clock((time.monotonic() - begin) / done * left)} left" if left else ""
                        say(console, f"[{done}/{total}{estimate}] {text} after {clock(time.monotonic() - started)}")
        finally:
            for process, _ in running.values():
                process.terminate()
            for process, _ in running.values():
                process.join()
    return outcome


def _start(cell: Cell, folder: Path, recipes: Path, train: cells_.Trainer, jobs: int) -> BaseProcess:
    # A fork of a fresh interpreter: no state of this one, its own main thread for launch's signal handlers, and the
    # imports run only once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["verl_sspo.experiments.cell"])
    process = context.Process(target=_run_in_process, args=(cell, folder, recipes, train, jobs), name=cell.name)
    process.start()
    return process


def _run_in_process(cell: Cell, folder: Path, recipes: Path, train: cells_.Trainer, jobs: int) -> None:
    # Ctrl-C in the terminal then reaches only `run`, which ends the cells in order.
    os.setsid()
    threading.Thread(target=_end_with_the_runner, daemon=True).start()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
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
    """Ends this cell when the process that runs the suite is gone without having done so."""
    if (runner := multiprocessing.parent_process()) is not None:
        runner.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _take_outcome(name: str, folder: Path, code: int | None, outcome: Outcome) -> str:
    """Records how a cell's process ended, and returns it in words."""
    if code == 0:
        outcome.finished.append(name)
        return f"{name} finished"
    if code == _BUSY:
        outcome.busy.append(name)
        return f"{name} is run by another process"
    failure = folder / cells_.FAILURE
    known = code == 1 and failure.exists()
    reason = json.loads(failure.read_text())["error"] if known else f"its process ended with status {code}"
    outcome.failed[name] = reason
    return f"{name} FAILED, see {folder / cells_.LOG}: {reason}"
