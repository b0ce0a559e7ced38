"""The processes of a run, and the guard that ends them if the launcher is killed.

    python -m verl_sspo.run.processes LAUNCHER_PID RUN_ID RAY_DIR

is that guard: it waits until its parent, the launcher, is gone, then kills the run and removes Ray's temporary folder.
Without it a run whose launcher was killed would keep training and writing to its folder.
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

# Every process of a run inherits this variable. It tells them from those of other runs and other Ray clusters.
RUN_ID = "VERL_SSPO_RUN_ID"

# The argument of main_ppo that names the folder of its run, in quotes.
WRITES_TO = "hydra.run.dir="

# Seconds that Ray gets to end its processes by itself, and that killed ones get to be gone.
GRACE = 10


class Family:
    """All processes of a run: main_ppo, and those that Ray starts in sessions of their own.

    A process belongs to the run if it inherited the run's id, or if it descends from one that did: some are started
    with an empty environment, and once a parent has ended, its children can no longer be told by descent.
    """

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.known: set[psutil.Process] = set()
        # What Ray calls them, e.g. `WorkerDict.actor_update_actor`, and the first and the last look at such an actor.
        self._actors: dict[psutil.Process, tuple[str, int, int]] = {}
        self._looks = 0

    def add(self, pid: int) -> None:
        """Makes a process known whose descendants belong to the run."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.known.add(psutil.Process(pid))

    def look(self) -> None:
        """Takes note of the descendants there are now, and of what Ray calls them."""
        # Each process is read once, whatever the number of the known: `Process.children` would read all for each.
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
        """A process of the run, dead or alive, as a person would call it."""
        title = next((title for process, (title, _, _) in self._actors.items() if process.pid == pid), "a worker")
        return f"{title} (process {pid})"

    def is_restarted(self, pid: int) -> bool:
        """Whether Ray has restarted the actor of a dead process: one of its class appeared when it was gone."""
        dead = [seen for process, seen in self._actors.items() if process.pid == pid]
        return any(
            _actor(title) == _actor(lost) and first > last and is_alive(process)
            for lost, _, last in dead
            for process, (title, first, _) in self._actors.items()
        )

    def alive(self) -> list[psutil.Process]:
        for process in psutil.process_iter():
            # Other users' processes do not show their environment.
            with contextlib.suppress(psutil.Error):
                if process.environ().get(RUN_ID) == self.run_id:
                    self.known.add(process)
        self.look()
        return [process for process in self.known if is_alive(process)]

    def end(self, main: subprocess.Popen) -> list[psutil.Process]:
        """Asks main_ppo to shut its cluster down, waits for `GRACE`, and kills what is left.

        Returns:
            Processes that are still there, see `kill`.
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
        """Kills all of them.

        Returns:
            Processes that are still there after `GRACE`: they wait for a disk or a driver that does not answer, and
            end when it does.
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
    """The class in what Ray calls a process: `WorkerDict` of `WorkerDict.actor_update_actor`."""
    return re.split(r"\W", title)[0]


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def running_in(folder: Path) -> int | None:
    """The main_ppo, if there is one, that writes to this run folder or to one below it."""
    mark = WRITES_TO + quoted(f"{folder.resolve()}/").removesuffix("'")
    for process in psutil.process_iter(["pid", "cmdline"]):
        if any(argument.startswith(mark) for argument in process.info["cmdline"] or ()):
            return process.info["pid"]
    return None


@contextlib.contextmanager
def guarded(family: Family, ray_dir: Path, log: BinaryIO) -> Iterator[None]:
    """While this is entered, a guard ends the run should this process be killed, and says so in `log`.

    The guard stays if this is left with processes of the run alive, e.g. because Ctrl-C came again while they were
    being ended.
    """
    command = [sys.executable, "-m", "verl_sspo.run.processes", str(os.getpid()), family.run_id, str(ray_dir)]
    # In a session of its own: what ends the launcher's group may not end the guard.
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
    print(f"verl_sspo: the launcher, process {launcher}, is gone and its run was still there: ending it", flush=True)
    Family(run_id).kill()
    shutil.rmtree(ray_dir, ignore_errors=True)


if __name__ == "__main__":
    _guard(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
