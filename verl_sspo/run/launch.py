"""Runs verl's `main_ppo` as a child process, with a log file and a line per step, and leaves no process behind.

`verl_sspo.run.folder` describes the run folder.
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

from verl_sspo.compose import compose_config, hydra_overrides, quoted
from verl_sspo.run.folder import LOG, METRICS
from verl_sspo.run.processes import RUN_ID, WRITES_TO, Family, guarded
from verl_sspo.run.screen import Screen, say
from verl_sspo.run.task import whole_paths

# Seconds that verl has to fail by itself after one of its processes has died. Ray does not restart verl's actors, but
# may restart the user's own within this time.
PATIENCE = 10

# What Ray prints about a process that died unexpectedly, and about an actor whose node died.
DEATH = re.compile(r"Worker PID: (\d+) Worker exit type: SYSTEM_ERROR|The actor died because its node has died")

# What Ray prints about a dead node. Not a reason to end a run, which may not use that node.
NODE_DEATH = re.compile(r"Raylet is terminated|has been marked dead because the detector")

# Debug output of raylets.
RAYLET = re.compile(r"\[state-dump\]|\(raylet\) \w+\.(cc|h):\d+:")

# Errors of Python and of torch.save when the disk is full.
UNWRITTEN = re.compile(r"No space left on device|Disk quota exceeded|inline_container\.cc.* unexpected pos")
FULL = "a file could not be written (is the disk full?)"

# What verl and Ray print during start-up, in this order.
PHASES = (
    ("ray init kwargs", "starting Ray"),
    (r"Started a local Ray instance|Connected to Ray cluster", "loading the workers"),
    ("Total training steps", "loading the model"),
    ("Creating file logger", "first rollout"),
)
TOTAL_STEPS = re.compile(r"Total training steps: (\d+)")
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
ACTOR_PREFIX = re.compile(r"^\(.*?pid=\d+.*?\) ?")

# A socket's path has at most 107 characters: TMPDIR, 14 for our folder in it, and up to 66 that Ray adds.
LONGEST_TMPDIR = 27

# Arguments of ray.init for a new cluster. Ray rejects them when it joins an existing cluster.
OF_A_NEW_CLUSTER = ("num_cpus", "num_gpus", "resources", "labels", "object_store_memory", "_system_config")


class TrainingFailedError(RuntimeError):
    """main_ppo ended with an error.

    Args:
        returncode: exit status of main_ppo; negative for the signal that ended it.
        log: the log file.
        excerpt: the part of the log that says why.
        cause: the underlying cause, if known.
    """

    def __init__(self, returncode: int, log: Path, excerpt: str, cause: str | None = None) -> None:
        if returncode < 0:
            how = f"was ended by {signal.Signals(-returncode).name}"
        else:
            how = f"failed with exit code {returncode}" if returncode else "exited with code 0 after a worker died"
        super().__init__(f"{cause + ': ' if cause else ''}verl's main_ppo {how}; the whole log is {log}")
        self.returncode = returncode
        self.log = log
        self.excerpt = excerpt
        self.cause = cause


def train(
    overrides: Sequence[str],
    run_dir: Path,
    *,
    config_dir: Path,
    config_name: str,
    console: Console | None = None,
    address: str = "local",
    total: int | None = None,
    verbose: bool = False,
) -> Path:
    """Runs `python -m verl.trainer.main_ppo --config-dir ... --config-name ... *overrides` to its end.

    However this function exits, no process of the run stays alive on this machine. If this process is killed, the run
    is ended within seconds (`verl_sspo.run.processes`). The run also ends if a worker or server dies: verl itself would
    wait for some of them forever.

    Args:
        overrides: Hydra overrides, as on main_ppo's command line.
        run_dir: run folder, see `verl_sspo.run.folder`. It must not contain a run yet (`move_aside`).
        config_dir: Hydra config folder of the recipes.
        config_name: name of the recipe.
        console: where to show progress; default: stderr.
        address: address of a running Ray cluster to join. `local` starts a new cluster, even if others are running.
        total: number of training steps, if known before verl prints it.
        verbose: also show what main_ppo prints.

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
        raise FileExistsError(f"{run_dir} already holds a run: move it aside or choose another folder")
    run_dir.mkdir(parents=True, exist_ok=True)

    family, finished = Family(uuid.uuid4().hex), False
    ray_dir = _temporary_folder()
    ours = {RUN_ID: family.run_id, "VERL_FILE_LOGGER_PATH": str(metrics)}
    command = [sys.executable, "-m", "verl.trainer.main_ppo"]
    command += ["--config-dir", str(config_dir), "--config-name", config_name]
    command += [f"{WRITES_TO}{quoted(f'{run_dir}/hydra')}"]
    if address != "local":
        command += [*overrides, *_to_join(overrides, ours, config_dir, config_name)]
    else:
        command += [f"+ray_kwargs.ray_init._temp_dir={quoted(str(ray_dir))}", *overrides]
    environment = os.environ | ours | {"RAY_ADDRESS": address, "PYTHONUNBUFFERED": "1"}
    try:
        with signals_interrupt(), log.open("xb") as log_file, guarded(family, ray_dir, log_file):
            child = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                # Ctrl-C in the terminal then reaches only this process, which ends the others in order.
                start_new_session=True,
            )
            family.add(child.pid)
            try:
                with Screen(console, total) as screen:
                    died = _follow(child, family, log, metrics, screen, verbose)
            finally:
                try:
                    if child.poll() is None:
                        say(console, "Ending the run: shutting down Ray and its workers.")
                finally:
                    # Even if nothing can be printed, because the terminal is closed or the disk is full.
                    if left := family.end(child):
                        say(console, f"These processes cannot be killed, they wait for a disk or a driver: {left}")
        # A main_ppo that cannot be killed has no exit code yet.
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=1)
        returncode = -signal.SIGKILL if child.returncode is None else child.returncode
        if returncode != 0 or died:
            excerpt = _excerpt(log)
            # The log is on the same disk: if the disk is full, the log may not say why the run failed.
            full = FULL if UNWRITTEN.search(excerpt) or shutil.disk_usage(run_dir).free < 2**16 else None
            text = log.read_text(encoding="utf-8", errors="replace")
            node = "a node of the Ray cluster died" if NODE_DEATH.search(text) else None
            raise TrainingFailedError(returncode, log, excerpt, full or died or node)
        finished = True
        return metrics
    finally:
        if not finished:
            # If there is no space for Ray's logs, the error of the run must still be raised.
            with contextlib.suppress(OSError):
                for logs in ray_dir.glob("session_2*/logs"):
                    shutil.copytree(logs, run_dir / "ray", ignore_dangling_symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(ray_dir, ignore_errors=True)


def _temporary_folder() -> Path:
    """Makes a folder for Ray in TMPDIR, or in /tmp if TMPDIR is too long for Ray's sockets."""
    usual = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="verl-", dir=usual if len(usual) <= LONGEST_TMPDIR else "/tmp"))


def _to_join(overrides: Sequence[str], ours: dict[str, str], config_dir: Path, config_name: str) -> list[str]:
    """Overrides that make main_ppo run on an existing cluster.

    Its workers inherit environment and working folder from its raylets, not from us. Variables that verl and this
    package read are therefore passed through Ray's runtime environment. Secrets are not passed, because others can see
    command lines: set them in the environment of `ray start`.
    """
    forwarded = {name: value for name, value in os.environ.items() if name.startswith("VERL_")} | ours
    config = compose_config(config_name, overrides, config_dir)
    ray_init = config.ray_kwargs.ray_init
    return [
        *(f"ray_kwargs.ray_init.{name}=null" for name in OF_A_NEW_CLUSTER if ray_init.get(name) is not None),
        *(f"++ray_kwargs.ray_init.runtime_env.env_vars.{k}={quoted(v)}" for k, v in forwarded.items()),
        *hydra_overrides(whole_paths(config)),
    ]


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP raise KeyboardInterrupt, as SIGINT does, so that processes are ended in order.

    Ignored signals stay ignored, such as SIGHUP under nohup.
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


def _follow(
    child: subprocess.Popen, family: Family, log: Path, metrics: Path, screen: Screen, verbose: bool
) -> str | None:
    """Shows log and metrics until main_ppo ends, or until `PATIENCE` seconds after a worker died without a restart.

    Returns:
        Which worker died first, and whether verl noticed. None if none died, or if Ray has restarted it.
    """
    phases = list(PHASES)
    log_lines, metric_lines = _new_lines(log), _new_lines(metrics)
    # What died, its process id (None for a node), and when.
    dead: tuple[str, int | None, float] | None = None
    ended = False
    while not ended:
        ended = child.poll() is not None or (dead is not None and time.time() > dead[2] + PATIENCE)
        family.look()
        for line in next(log_lines):
            if verbose:
                say(screen.console, line)
            if match := TOTAL_STEPS.search(line):
                screen.total = int(match[1])
            for i, (sign, phase) in enumerate(phases):
                if re.search(sign, line):
                    screen.phase(phase)
                    del phases[: i + 1]
                    break
            if dead is None and (match := DEATH.search(line)):
                pid = int(match[1]) if match[1] else None
                what = "a node of the Ray cluster died" if pid is None else f"{family.name(pid)} was killed or crashed"
                dead = what, pid, time.time()
                say(screen.console, f"{what}: verl has {PATIENCE} s to end the run")
        for line in next(metric_lines):
            entry = json.loads(line)
            # JSON has no NaN: verl writes null.
            screen.step(entry["step"], {k: math.nan if v is None else v for k, v in entry["data"].items()})
        if dead and dead[1] is not None and family.is_restarted(dead[1]):
            say(screen.console, f"Ray has restarted {family.name(dead[1])}: the run continues")
            dead = None
            ended = child.poll() is not None
        if not ended:
            time.sleep(0.5)
    if dead is None:
        return None
    unnoticed = f" and verl did not end in {PATIENCE} s" if child.poll() is None else ""
    return f"{dead[0]}{unnoticed}"


def _new_lines(path: Path) -> Iterator[list[str]]:
    """Each `next` returns the complete lines written since the previous call; the file may not exist yet."""
    while not path.exists():
        yield []
    rest = ""
    with path.open(encoding="utf-8", errors="replace") as file:
        while True:
            *lines, rest = (rest + file.read()).split("\n")
            yield lines


def _excerpt(log: Path, lines: int = 40) -> str:
    """The last traceback in a log, or else its last lines, without colours and Ray's prefixes."""
    text = ANSI.sub("", log.read_text(encoding="utf-8", errors="replace"))
    cleaned = [ACTOR_PREFIX.sub("", line) for line in text.splitlines() if not RAYLET.search(line)]
    start = max(
        (i for i, line in enumerate(cleaned) if line.startswith("Traceback (most recent call last)")), default=0
    )
    return "\n".join(cleaned[start:][-lines:])


def report_failure(error: TrainingFailedError, console: Console) -> None:
    """Prints why a run failed."""
    say(console, error.excerpt)
    say(console, str(error), style="bold red")
