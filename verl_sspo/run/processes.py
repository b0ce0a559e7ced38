"""The processes of a run, and the guard that ends them if the launcher is killed.

    python -m verl_sspo.run.processes LAUNCHER_PID RUN_ID RAY_DIR

is the guard. It waits until its parent, the launcher, is gone, then kills the run and removes Ray's temporary folder.
Without it, a run whose launcher was killed would keep training and writing to its folder.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import psutil

from verl_sspo.compose import quoted

# Every process of a run inherits this variable. It distinguishes them from other runs and other Ray clusters.
RUN_ID = "VERL_SSPO_RUN_ID"

# The argument of main_ppo that names the folder of its run, in quotes.
WRITES_TO = "hydra.run.dir="

# Seconds that Ray has to end its processes by itself, and that killed processes have to disappear.
GRACE = 10


class Family:
    """All processes of a run: main_ppo, and those that Ray starts in their own sessions.

    A process belongs to the run if it inherited the run's id, or if it descends from such a process. Both are needed:
    some processes start with an empty environment, and once a parent has ended, its children have lost their descent.
    """

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.known: set[psutil.Process] = set()
        # Ray's title, e.g. `WorkerDict.actor_update_actor`, and the first and the last look that found this actor.
        self._actors: dict[psutil.Process, tuple[str, int, int]] = {}
        self._looks = 0

    def add(self, pid: int) -> None:
        """Adds a process. Its descendants belong to the run too."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.known.add(psutil.Process(pid))

    def look(self) -> None:
        """Records the current descendants, and Ray's titles for them."""
        # Read each process only once: `Process.children` would read all of them for every known process.
        there, children = set(), defaultdict(list)
        for process in psutil.process_iter(["ppid"]):
            there.add(process)
            children[process.info["ppid"]].append(process)
        new = list(self.known & there)
        while new:
            self.known.update(found := children[new.pop().pid])
            new += found
        self._looks += 1
        for process in self.known & there:
            with contextlib.suppress(psutil.Error, IndexError):
                if (title := process.cmdline()[0]).startswith("ray::"):
                    before, first, _ = self._actors.get(process, ("", 0, 0))
                    title = title.removeprefix("ray::")
                    first = first if _actor(before) == _actor(title) else self._looks
                    self._actors[process] = title, first, self._looks

    def name(self, pid: int) -> str:
        """A readable name of a process of the run, dead or alive."""
        title = next((title for process, (title, _, _) in self._actors.items() if process.pid == pid), "a worker")
        return f"{title} (process {pid})"

    def is_restarted(self, pid: int) -> bool:
        """Whether Ray has restarted the actor of a dead process: an actor of its class appeared after it was gone."""
        dead = [seen for process, seen in self._actors.items() if process.pid == pid]
        return any(
            _actor(title) == _actor(lost) and first > last and is_alive(process)
            for lost, _, last in dead
            for process, (title, first, _) in self._actors.items()
        )

    def alive(self) -> list[psutil.Process]:
        for process in psutil.process_iter():
            # The environment of other users' processes cannot be read.
            with contextlib.suppress(psutil.Error):
                if process.environ().get(RUN_ID) == self.run_id:
                    self.known.add(process)
        self.look()
        return [process for process in self.known if is_alive(process)]

    def end(self, main: subprocess.Popen) -> list[psutil.Process]:
        """Asks main_ppo to shut down its cluster, waits up to `GRACE` seconds, and kills what is left.

        Returns:
            Processes that cannot be killed, see `kill`.
        """
        try:
            main.terminate()
            deadline = time.monotonic() + GRACE
            while self.alive() and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            left = self.kill()
        return left

    def kill(self) -> list[psutil.Process]:
        """Kills all processes of the run.

        Returns:
            Processes that are still there after `GRACE` seconds: they wait for a disk or a driver that does not answer,
            and end when it does.
        """
        deadline = time.monotonic() + GRACE
        # A process may start another while it is being killed.
        while (alive := self.alive()) and time.monotonic() < deadline:
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(alive, timeout=1)
        return alive


def _actor(title: str) -> str:
    """The class in Ray's title of a process: `WorkerDict` for `WorkerDict.actor_update_actor`."""
    return re.split(r"\W", title)[0]


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def running_in(folder: Path) -> int | None:
    """The process id of a main_ppo that writes to this run folder or to one below it, or None."""
    mark = WRITES_TO + quoted(f"{folder.resolve()}/").removesuffix("'")
    for process in psutil.process_iter(["pid", "cmdline"]):
        if any(argument.startswith(mark) for argument in process.info["cmdline"] or ()):
            return process.info["pid"]
    return None


@contextlib.contextmanager
def guarded(family: Family, ray_dir: Path, log: BinaryIO) -> Iterator[None]:
    """Inside this context, a guard ends the run if this process is killed, and says so in `log`.

    The guard stays if processes of the run are still alive at the end, e.g. after a second Ctrl-C while they were
    being ended.
    """
    command = [sys.executable, "-m", "verl_sspo.run.processes", str(os.getpid()), family.run_id, str(ray_dir)]
    # In its own session: a signal to the launcher's process group must not end the guard.
    guard = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        yield
    finally:
        if not family.alive():
            guard.kill()
            guard.wait()


def _guard(launcher: int, run_id: str, ray_dir: Path) -> None:
    while os.getppid() == launcher:
        time.sleep(0.5)
    print(f"verl_sspo: the launcher, process {launcher}, is gone: ending its run", flush=True)
    Family(run_id).kill()
    shutil.rmtree(ray_dir, ignore_errors=True)


if __name__ == "__main__":
    _guard(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
