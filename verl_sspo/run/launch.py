"""Runs verl's `main_ppo` as a child process: a run folder, a log file, a progress line, and nothing left behind.

with the run folder `runs/quickstart`:
train.log      everything that verl, Ray and the workers print
metrics.jsonl  verl's metrics, one JSON object {"step": ..., "data": {...}} a line
hydra/         the configuration as it ran
ray/           the logs of Ray's processes, kept when a run fails
attempt-1/     all of this from an earlier start, where a later one resumed; attempt-2/ and so on
"""

import contextlib
import json
import math
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

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from verl_sspo.run.overrides import quoted
from verl_sspo.run.processes import RUN_ID, WRITES_TO, Family, guarded

LOG = "train.log"
METRICS = "metrics.jsonl"

# Seconds that verl gets to fail by itself once one of its processes has died.
PATIENCE = 60

# What Ray prints of a process that it did not end itself.
DEATH = re.compile(r"Worker PID: (\d+) Worker exit type: SYSTEM_ERROR")

# What Python says where there is no space, and what torch.save does.
UNWRITTEN = re.compile(r"No space left on device|Disk quota exceeded|inline_container\.cc.* unexpected pos")

# What verl and Ray print as they come up, in the order in which they do.
PHASES = (
    ("ray init kwargs", "starting Ray"),
    ("Started a local Ray instance", "loading the workers"),
    ("Total training steps", "loading the model"),
    ("Creating file logger", "first validation"),
)
ATTEMPT = re.compile(r"attempt-(\d+)")
TOTAL_STEPS = re.compile(r"Total training steps: (\d+)")
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
ACTOR_PREFIX = re.compile(r"^\(.*?pid=\d+.*?\) ?")


class TrainingFailedError(RuntimeError):
    """main_ppo ended with an error.

    Args:
        returncode: exit status of main_ppo; negative for the signal that ended it.
        log: the log file.
        excerpt: the part of it that says why.
        cause: what was behind it, where more is known than that.
    """

    def __init__(self, returncode: int, log: Path, excerpt: str, cause: str | None = None) -> None:
        if returncode < 0:
            how = f"was ended by {signal.Signals(-returncode).name}"
        else:
            how = f"failed with exit code {returncode}" if returncode else "ended as if nothing had happened"
        super().__init__(f"{cause + ': ' if cause else ''}verl's main_ppo {how}; the whole log is {log}")
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


def attempts(run_dir: Path) -> list[Path]:
    """The folders `attempt-<n>` of a run, oldest first: each resumed what the one before had left."""
    found = [(int(match[1]), path) for path in run_dir.glob("attempt-*") if (match := ATTEMPT.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def keep_attempt(run_dir: Path) -> None:
    """Moves what the last start wrote to `attempt-<n>`, so that another one can go on in this run folder."""
    attempt = run_dir / f"attempt-{len(attempts(run_dir)) + 1}"
    attempt.mkdir()
    for name in (LOG, METRICS, "hydra", "ray"):
        if (run_dir / name).exists():
            (run_dir / name).rename(attempt / name)


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
    by whatever way, no process of the run is alive; if this process is killed, they are ended within seconds
    (`verl_sspo.run.processes`). A worker or server that dies ends the run: verl itself waits for some of them for ever.

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
        TrainingFailedError: main_ppo failed, or one of its workers died.
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
    command += [f"{WRITES_TO}{quoted(f'{run_dir}/hydra')}", f"+ray_kwargs.ray_init._temp_dir={ray_dir}", *overrides]
    environment = os.environ | {
        RUN_ID: run_id,
        "VERL_FILE_LOGGER_PATH": str(metrics),
        # A cluster of our own, also where RAY_ADDRESS or a cluster of this host invites to join.
        "RAY_ADDRESS": "local",
        "PYTHONUNBUFFERED": "1",
    }
    family, finished = Family(run_id), False
    try:
        with signals_interrupt(), log.open("xb") as log_file, guarded(family, ray_dir, log_file):
            child = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                # Ctrl-C in the terminal then reaches this process alone, which ends the others in order.
                start_new_session=True,
            )
            family.add(child.pid)
            try:
                with _Display(console) as display:
                    died = _follow(child, family, log, metrics, display)
            finally:
                try:
                    if child.poll() is None:
                        console.print("ending the run: Ray and its workers are shut down")
                finally:
                    # Also where nothing can be shown any more: the terminal is closed, the disk full.
                    family.end(child)
        returncode = child.wait()
        if returncode != 0 or died:
            excerpt = _excerpt(log)
            unwritten = "a file could not be written (is the disk full?)" if UNWRITTEN.search(excerpt) else None
            raise TrainingFailedError(returncode, log, excerpt, died or unwritten)
        finished = True
        return metrics
    finally:
        if not finished:
            # Why the run failed matters more than its logs: there may be no space for them.
            with contextlib.suppress(OSError):
                _keep_ray_logs(ray_dir, run_dir / "ray")
        shutil.rmtree(ray_dir, ignore_errors=True)


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt, as SIGINT does, so that what runs is ended in order.

    A signal that is ignored stays ignored: nohup does that with SIGHUP.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, _frame: Any) -> None:
        raise KeyboardInterrupt(signal.Signals(signum).name)

    heeded = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) != signal.SIG_IGN]
    previous = {signum: signal.signal(signum, interrupt) for signum in heeded}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


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


def _follow(child: subprocess.Popen, family: Family, log: Path, metrics: Path, display: _Display) -> str | None:
    """Shows what the log and the metrics say until main_ppo ends, or has not `PATIENCE` after a worker's death.

    Returns:
        Which worker died first, if one did, and whether verl noticed.
    """
    phases = list(PHASES)
    log_lines, metric_lines = _new_lines(log), _new_lines(metrics)
    died, deadline = None, math.inf
    ended = False
    while not ended:
        ended = child.poll() is not None or time.monotonic() > deadline
        family.look()
        for line in next(log_lines):
            if match := TOTAL_STEPS.search(line):
                display.total = int(match[1])
            for i, (sign, phase) in enumerate(phases):
                if sign in line:
                    display.show(phase)
                    del phases[: i + 1]
                    break
            if died is None and (match := DEATH.search(line)):
                died, deadline = f"{family.name(int(match[1]))} was killed or crashed", time.monotonic() + PATIENCE
                display.show(f"{died}: verl is given {PATIENCE} s to end the run")
        for line in next(metric_lines):
            entry = json.loads(line)
            # NaN has no JSON: verl writes null.
            data = {name: math.nan if value is None else value for name, value in entry["data"].items()}
            display.metrics(entry["step"], data)
        if not ended:
            time.sleep(0.5)
    if died and child.poll() is None:
        died += f" and verl did not end in {PATIENCE} s"
    return died


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
