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
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from verl_sspo.experiments import cell as cells_
from verl_sspo.experiments.suite import Cell
from verl_sspo.report.summary import Metrics
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
    name: str
    folder: Path
    process: BaseProcess
    started: float

    def steps(self) -> tuple[int, int | None]:
        """Training steps done, and those there are in all as soon as verl has said so."""
        attempts = cells_.attempts(self.folder)
        log = attempts[-1] / launch.LOG if attempts else None
        said = log.read_text(encoding="utf-8", errors="replace") if log and log.exists() else ""
        total = launch.TOTAL_STEPS.search(said)
        return max(Metrics.read_attempts(attempts).steps, default=0), int(total[1]) if total else None


def run(
    cells: Sequence[Cell],
    root: Path,
    recipes: Path,
    *,
    jobs: int = 1,
    console: Console | None = None,
    train: cells_.Trainer = launch.train,
    poll_seconds: float = 2.0,
) -> Outcome:
    """Runs every cell that is not finished, each in a process of its own. The failure of one does not stop the others.

    Args:
        cells: what to run, in this order.
        root, recipes: folder of the suite's runs, and Hydra tree of the recipes.
        jobs: cells side by side. Each then has the CPU cores divided by `jobs` as threads.
        console, poll_seconds: where the progress goes (stderr), and how often it is updated.
        train: what runs main_ppo; a function of a module, since it is called in another process.

    Raises:
        KeyboardInterrupt: on SIGINT, SIGTERM or SIGHUP, after the running cells have ended their processes.
    """
    console = console or Console(stderr=True)
    finished = [cell.name for cell in cells if cells_.state(root / cell.name) == "finished"]
    pending = [cell for cell in cells if cell.name not in finished]
    outcome = Outcome(skipped=finished)
    if finished:
        console.print(f"{len(finished)} of {len(cells)} cells are finished already", highlight=False)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # The time left is estimated from everything that has been done so far: cells take minutes or hours.
    options = {"console": console, "disable": not console.is_terminal, "transient": True}
    progress = Progress(*columns, speed_estimate_period=1e9, **options)  # type: ignore[arg-type]
    total = len(pending)
    overall = progress.add_task("suite", total=total)
    running: dict[TaskID, _Running] = {}

    def say(text: str) -> None:
        left = progress.tasks[0].time_remaining
        estimate = f", about {max(1, round(left / 60))} min left" if left and pending + list(running) else ""
        done = total - len(pending) - len(running)
        console.print(f"[{done}/{total}{estimate}] {text}", markup=False, highlight=False, soft_wrap=True)

    with launch.signals_interrupt():
        try:
            with progress:
                while pending or running:
                    while pending and len(running) < jobs:
                        each = _start(pending.pop(0), root, recipes, train, threads)
                        running[progress.add_task(each.name, total=None)] = each
                        say(f"{each.name} started, log: {each.folder / cells_.LOG}")
                    connection.wait([each.process.sentinel for each in running.values()], timeout=poll_seconds)
                    done = 0.0
                    for task, each in list(running.items()):
                        step, steps = each.steps()
                        if each.process.is_alive():
                            done += step / steps if steps else 0.0
                            progress.update(task, completed=step, total=steps)
                        else:
                            del running[task]
                            progress.remove_task(task)
                            say(_take_outcome(each, outcome))
                    progress.update(overall, completed=total - len(pending) - len(running) + done)
        finally:
            for each in running.values():
                each.process.terminate()
            for each in running.values():
                each.process.join()
    return outcome


def _start(cell: Cell, root: Path, recipes: Path, train: cells_.Trainer, threads: int) -> _Running:
    folder = root / cell.name
    # A fork of a fresh interpreter: no state of this one, its own main thread for launch's signal handlers, and the
    # imports are paid once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["verl_sspo.experiments.cell"])
    process = context.Process(target=_run_in_process, args=(cell, folder, recipes, train, threads), name=cell.name)
    process.start()
    return _Running(cell.name, folder, process, time.monotonic())


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


def _take_outcome(each: _Running, outcome: Outcome) -> str:
    """Enters how a cell's process ended, and says it."""
    code, seconds = each.process.exitcode, time.monotonic() - each.started
    failure = each.folder / cells_.FAILURE
    if code == 0:
        outcome.finished.append(each.name)
        return f"{each.name} finished in {seconds:.0f} s"
    if code == _BUSY:
        outcome.busy.append(each.name)
        return f"{each.name} is run by another process and left to it"
    reason = f"its process ended with status {code}, see {each.folder / cells_.LOG}"
    if code == 1 and failure.exists():
        reason = json.loads(failure.read_text())["error"]
    outcome.failed[each.name] = reason
    return f"{each.name} FAILED after {seconds:.0f} s: {reason}"
