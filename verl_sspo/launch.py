"""Runs verl's `main_ppo` as a child process: a run folder, a log file, a progress line, and nothing left behind.

with the run folder `runs/quickstart`:
train.log      everything that verl, Ray and the workers print
metrics.jsonl  verl's metrics, one JSON object {"step": ..., "data": {...}} a line
hydra/         the configuration as it ran
ray/           the logs of Ray's processes, kept when a run fails
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

LOG = "train.log"
METRICS = "metrics.jsonl"

# Every process of a run inherits this variable; it tells them from those of other runs and other Ray clusters.
RUN_ID = "VERL_SSPO_RUN_ID"

# Seconds that Ray gets to end its processes by itself.
GRACE = 10

# What verl and Ray print as they come up, in the order in which they do.
PHASES = (
    ("ray init kwargs", "starting Ray"),
    ("Started a local Ray instance", "loading the workers"),
    ("Total training steps", "loading the model"),
    ("Creating file logger", "first validation"),
)
TOTAL_STEPS = re.compile(r"Total training steps: (\d+)")
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
ACTOR_PREFIX = re.compile(r"^\(.*?pid=\d+.*?\) ?")


class TrainingFailedError(RuntimeError):
    """main_ppo ended with an error.

    Args:
        returncode: exit status of main_ppo; negative for the signal that ended it.
        log: the log file.
        excerpt: the part of it that says why.
    """

    def __init__(self, returncode: int, log: Path, excerpt: str) -> None:
        super().__init__(f"verl's main_ppo failed with exit code {returncode}; the whole log is {log}")
        self.returncode = returncode
        self.log = log
        self.excerpt = excerpt


def move_aside(run_dir: Path) -> Path | None:
    """Renames the folder of an earlier run to `<name>-<time it was last written>`.

    Returns:
        The new place, or None if there was no such folder.
    """
    if not run_dir.exists():
        return None
    newest = max(path.stat().st_mtime for path in (run_dir, *run_dir.iterdir()))
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(newest))
    names = (f"{run_dir.name}-{stamp}{suffix}" for suffix in ("", *(f"-{i}" for i in range(2, 1000))))
    aside = next(path for name in names if not (path := run_dir.with_name(name)).exists())
    run_dir.rename(aside)
    return aside


def train(
    overrides: Sequence[str],
    run_dir: Path,
    *,
    config_dir: Path,
    config_name: str,
    console: Console | None = None,
) -> Path:
    """Runs `python -m verl.trainer.main_ppo --config-dir ... --config-name ... *overrides` to its end.

    The run has a Ray cluster of its own, whatever other clusters there are on the machine. When the function is left,
    by whatever way, no process of the run is alive.

    Args:
        overrides: Hydra overrides, as on main_ppo's command line.
        run_dir: run folder, see the module; it may not hold a run already (`move_aside`).
        config_dir: Hydra tree of the recipes.
        config_name: recipe.
        console: where the progress goes: a bar in a terminal, a line a step elsewhere. stderr without it.

    Returns:
        The metrics file.

    Raises:
        FileExistsError: `run_dir` holds a run.
        TrainingFailedError: main_ppo failed.
        KeyboardInterrupt: SIGINT, SIGTERM or SIGHUP arrived.
    """
    console = console or Console(stderr=True)
    run_dir = run_dir.resolve()
    log, metrics = run_dir / LOG, run_dir / METRICS
    if log.exists():
        raise FileExistsError(f"{run_dir} holds a run already: move it aside or choose another folder")
    run_dir.mkdir(parents=True, exist_ok=True)

    run_id = uuid.uuid4().hex
    # Sockets lie in Ray's temporary folder and their paths may not exceed about 100 bytes, so TMPDIR will not do.
    ray_dir = Path(tempfile.mkdtemp(prefix="verl-", dir="/tmp"))
    command = [sys.executable, "-m", "verl.trainer.main_ppo"]
    command += ["--config-dir", str(config_dir), "--config-name", config_name]
    command += [f"hydra.run.dir={run_dir / 'hydra'}", f"+ray_kwargs.ray_init._temp_dir={ray_dir}", *overrides]
    environment = os.environ | {
        RUN_ID: run_id,
        "VERL_FILE_LOGGER_PATH": str(metrics),
        # A cluster of our own, also where RAY_ADDRESS or a cluster of this host invites to join.
        "RAY_ADDRESS": "local",
        "PYTHONUNBUFFERED": "1",
    }
    finished = False
    try:
        with _signals_interrupt(), log.open("xb") as log_file:
            child = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                # Ctrl-C in the terminal then reaches this process alone, which ends the others in order.
                start_new_session=True,
            )
            family = _Family(child.pid, run_id)
            try:
                with _Display(console) as display:
                    _follow(child, family, log, metrics, display)
            finally:
                family.end(console)
        if child.returncode != 0:
            raise TrainingFailedError(child.returncode, log, _excerpt(log))
        finished = True
        return metrics
    finally:
        if not finished:
            _keep_ray_logs(ray_dir, run_dir / "ray")
        shutil.rmtree(ray_dir, ignore_errors=True)


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt, as SIGINT does, so that the run is ended in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, _frame: Any) -> None:
        raise KeyboardInterrupt(signal.Signals(signum).name)

    previous = {signum: signal.signal(signum, interrupt) for signum in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


class _Family:
    """All processes of a run: main_ppo, and those that Ray starts in sessions of their own.

    A process belongs to the run if it descends from main_ppo, or if it inherited the run's id: once a parent has ended,
    its children can no longer be told by descent.
    """

    def __init__(self, pid: int, run_id: str) -> None:
        self.root = psutil.Process(pid)
        self.run_id = run_id
        self.known: set[psutil.Process] = {self.root}

    def look(self) -> None:
        """Takes note of the descendants there are now."""
        for process in list(self.known):
            with contextlib.suppress(psutil.NoSuchProcess):
                self.known.update(process.children(recursive=True))

    def alive(self) -> list[psutil.Process]:
        self.look()
        for process in psutil.process_iter():
            # Other users' processes do not show their environment.
            with contextlib.suppress(psutil.Error):
                if process.environ().get(RUN_ID) == self.run_id:
                    self.known.add(process)
        return [process for process in self.known if _is_alive(process)]

    def end(self, console: Console) -> None:
        """Asks main_ppo to shut its cluster down, waits for `GRACE`, and kills what is left."""
        try:
            if _is_alive(self.root):
                console.print("ending the run: Ray and its workers are shut down")
                self.root.terminate()
            deadline = time.monotonic() + GRACE
            while self.alive() and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            # A process may start another while it is being killed.
            while alive := self.alive():
                for process in alive:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                psutil.wait_procs(alive, timeout=5)


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


class _Display:
    """What the user sees while verl runs."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.total: int | None = None
        self.started = time.monotonic()
        self.first_step_at: tuple[int, float] | None = None
        self.accuracy: float | None = None
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task("starting", total=None)

    def __enter__(self) -> "_Display":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self, text: str, step: int = 0) -> None:
        self.progress.update(self.task, description=text, completed=step, total=self.total)
        if not self.console.is_terminal:
            self.console.print(f"[{time.monotonic() - self.started:4.0f} s] {text}", markup=False, highlight=False)

    def metrics(self, step: int, data: dict[str, float]) -> None:
        now = time.monotonic()
        accuracies = [value for name, value in data.items() if name.startswith("val-core/")]
        if accuracies:
            self.accuracy = accuracies[0]
        parts = [f"step {step}" + (f"/{self.total}" if self.total else "")]
        if "critic/score/mean" in data:
            parts.append(f"reward {data['critic/score/mean']:.3f}")
        if self.accuracy is not None:
            parts.append(f"validation {self.accuracy:.3f}")
        if self.first_step_at is None and step > 0:
            self.first_step_at = step, now
        elif self.first_step_at is not None and self.total:
            first, at = self.first_step_at
            left = (now - at) / max(step - first, 1) * (self.total - step)
            parts.append(f"{left // 60:.0f}:{left % 60:02.0f} left")
        self.show(", ".join(parts), step)


def _follow(child: subprocess.Popen, family: _Family, log: Path, metrics: Path, display: _Display) -> None:
    """Shows what the log and the metrics say until main_ppo ends."""
    phases = list(PHASES)
    log_lines, metric_lines = _new_lines(log), _new_lines(metrics)
    ended = False
    while not ended:
        ended = child.poll() is not None
        family.look()
        for line in next(log_lines):
            if match := TOTAL_STEPS.search(line):
                display.total = int(match[1])
            for i, (sign, phase) in enumerate(phases):
                if sign in line:
                    display.show(phase)
                    del phases[: i + 1]
                    break
        for line in next(metric_lines):
            entry = json.loads(line)
            display.metrics(entry["step"], entry["data"])
        if not ended:
            time.sleep(0.2)


def _new_lines(path: Path) -> Iterator[list[str]]:
    """Each `next` returns the complete lines written since the last one; the file may not exist yet."""
    while not path.exists():
        yield []
    rest = ""
    with path.open(encoding="utf-8", errors="replace") as file:
        while True:
            *lines, rest = (rest + file.read()).split("\n")
            yield lines


def _excerpt(log: Path, lines: int = 40) -> str:
    """The last traceback in a log, or its end, without colours and Ray's prefixes."""
    text = ANSI.sub("", log.read_text(encoding="utf-8", errors="replace"))
    cleaned = [ACTOR_PREFIX.sub("", line) for line in text.splitlines()]
    start = max(
        (i for i, line in enumerate(cleaned) if line.startswith("Traceback (most recent call last)")), default=0
    )
    return "\n".join(cleaned[start:][-lines:])


def _keep_ray_logs(ray_dir: Path, destination: Path) -> None:
    for logs in ray_dir.glob("session_2*/logs"):
        shutil.copytree(logs, destination, ignore_dangling_symlinks=True, dirs_exist_ok=True)


def report_failure(error: TrainingFailedError, console: Console) -> None:
    """Prints why a run failed."""
    console.print(Text(error.excerpt), soft_wrap=True)
    console.print(Text(str(error), style="bold red"), soft_wrap=True)
