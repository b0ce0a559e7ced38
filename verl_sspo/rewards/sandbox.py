"""Runs hostile programs in bubblewrap, with limits on time, memory, output and the number that run at once.

A sandbox has its own user, process, network, ipc, uts and mount namespaces, no capabilities, no environment and no
network. It sees only the Python standard library, the system's shared libraries and an empty /tmp in memory.
`sandbox_runner.py` runs inside; it adds resource limits and a system call filter.

If the caller is root, root builds the sandbox, since only root may read its Python's folder, and then enters it as
the unprivileged user `nobody`, since limits on processes do not bind root in any namespace.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import marshal
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from verl_sspo.rewards import sandbox_runner
from verl_sspo.rewards.sandbox_runner import decode, read_frame, readable

NOBODY = 65534
DEATH_SECONDS = 60.0
_ELSEWHERE = "+reward.custom_reward_function.reward_kwargs.sandbox_fusion_url=URL"


class SandboxError(RuntimeError):
    """The sandbox does not work on this host, whatever the program."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one program may use."""

    test_timeout: float = 5.0  # seconds of wall time for a test, or for a call of a function
    program_timeout: float = 30.0  # seconds of wall time for all tests of a program
    memory_bytes: int = 1 << 30  # address space
    disk_bytes: int = 64 << 20  # all files in /tmp
    output_bytes: int = 4 << 20  # what a test prints, or what a call returns
    threads: int = 32
    unsafe: bool = False  # without any protection, with the rights of the caller


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Tests that a program passed, tests in total, and why it did not pass all ("" if it did)."""

    passed: int
    total: int
    error: str = ""


# --- starting a sandbox ------------------------------------------------------------------------------------------


def _python() -> str:
    # The real interpreter, beside its standard library, not the link in a virtual environment.
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def _view() -> list[str]:
    """bubblewrap's options for the files that Python needs, read-only."""
    shown: list[str] = []
    bound: set[Path] = set()

    def show(path: Path, option: str = "--ro-bind") -> None:
        # bubblewrap would make missing parents unreadable for `nobody`.
        for parent in reversed(path.parents[:-1]):
            if parent not in bound and bound.isdisjoint(parent.parents):
                shown.extend(("--perms", "0755", "--dir", str(parent)))
        shown.extend((option, str(path), str(path)))
        bound.add(path)

    links = []
    for name in ("/usr/lib", "/usr/lib64", "/lib", "/lib64"):
        path = Path(name)
        if path.is_symlink():
            links += ["--symlink", os.readlink(path), name]
        elif path.is_dir():
            show(path)
    shown += links
    base = Path(sys.base_prefix).resolve()
    if base != Path("/usr"):
        show(base / "lib")
    show(Path(_python()))
    if (cached := Path("/etc/ld.so.cache")).exists():
        show(cached)
    # Hide installed packages: the project may be one of them.
    for packages in {sysconfig.get_path("purelib", vars={"base": str(base)}), f"{base}/lib/python3/dist-packages"}:
        if Path(packages).is_dir():
            shown += ["--tmpfs", packages, "--remount-ro", packages]
    show(Path("/dev/null"), "--dev-bind")
    return shown


@cache
def _wall(disk_bytes: int) -> tuple[str, ...]:
    """The command that runs another one inside the sandbox.

    Raises:
        SandboxError: bubblewrap is missing.
    """
    bubblewrap = shutil.which("bwrap")
    if bubblewrap is None:
        raise SandboxError(
            "running model-written programs needs bubblewrap: install the package `bubblewrap` (apt-get install "
            f"bubblewrap), or send programs to a SandboxFusion server ({_ELSEWHERE}). unsafe_without_sandbox=True runs "
            "them unprotected, with your rights."
        )
    view = _view()
    inner = [bubblewrap, "--unshare-user", "--unshare-all", "--die-with-parent", "--new-session"]
    inner += ["--clearenv", "--cap-drop", "ALL", "--uid", str(NOBODY), "--gid", str(NOBODY), "--hostname", "sandbox"]
    inner += [*view, "--size", str(disk_bytes), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"]
    if os.geteuid() != 0:
        return tuple(inner)
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise SandboxError("entering the sandbox as root needs `setpriv` (Debian package util-linux)")
    outer = [bubblewrap, "--unshare-pid", "--die-with-parent", "--clearenv"]
    outer += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    outer += [*view, "--proc", "/proc", "--dir", "/tmp", "--perms", "0755", "--dir", "/enter"]
    for tool in (bubblewrap, setpriv):
        outer += ["--ro-bind", tool, f"/enter/{os.path.basename(tool)}"]
    drop = ["/enter/setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    return (*outer, *drop, "/enter/bwrap", *inner[1:])


@cache
def _runner_code() -> bytes:
    return marshal.dumps(compile(Path(sandbox_runner.__file__).read_bytes(), "<runner>", "exec", dont_inherit=True))


# Loads the runner from stdin. The runner then reads the request there.
_STUB = "import sys,marshal;exec(marshal.load(sys.stdin.buffer))"


@contextlib.contextmanager
def _started(
    request: dict[str, Any], limits: Limits, pass_fds: tuple[int, ...] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """A running sandbox; leaving the context kills everything in it."""
    wall = () if limits.unsafe else _wall(limits.disk_bytes)
    if platform.machine() not in sandbox_runner.ARCHITECTURES:
        raise SandboxError(f"no system call filter for {platform.machine()}")
    # A file in memory, so that neither process waits for the other.
    with open(os.memfd_create("request"), "wb") as stdin:
        stdin.write(_runner_code() + marshal.dumps(request | {"limits": dataclasses.asdict(limits)}))
        stdin.flush()
        stdin.seek(0)
        process = subprocess.Popen(
            [*wall, _python(), "-I", "-S", "-X", "utf8", "-c", _STUB],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            cwd="/",
            pass_fds=pass_fds,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _kill(process)
        assert process.stdout is not None
        assert process.stderr is not None
        with process.stdout as stdout, process.stderr:
            _drain(stdout.fileno())


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a sandbox from the inside out, so that bubblewrap itself reaps what it started.

    If bubblewrap died first, its child would go to process 1 of the container, which often does not reap.
    """
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        if children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5.0)
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _drain(descriptor: int) -> None:
    """Reads to the end, that is until the last process of the sandbox is dead."""
    deadline = time.monotonic() + DEATH_SECONDS
    while readable(descriptor, deadline - time.monotonic()):
        if not os.read(descriptor, 1 << 20):
            return
    raise SandboxError(f"processes of a sandbox are still alive {DEATH_SECONDS:.0f} s after they were killed")


def _frames(process: subprocess.Popen[bytes], limits: Limits, deadline: float) -> Iterator[bytes]:
    """The frames that the runner sends, until it ends.

    Raises:
        TimeoutError: The deadline (monotonic clock) has passed.
        ValueError: The runner sent something that is not a frame.
        SandboxError: The runner did not start.
    """
    assert process.stdout is not None
    assert process.stderr is not None
    descriptor = process.stdout.fileno()
    try:
        read_frame(descriptor, 8, deadline)
    except EOFError:
        process.wait()
        reason = os.read(process.stderr.fileno(), 4096).decode(errors="replace").strip() or "no error message"
        raise SandboxError(
            f"the sandbox does not start on this host: {reason}. It needs user namespaces (in a container: "
            f"--security-opt seccomp=unconfined, or --privileged). A SandboxFusion server needs none ({_ELSEWHERE})."
        ) from None
    with contextlib.suppress(EOFError):
        while True:
            yield read_frame(descriptor, limits.output_bytes + 4096, deadline)


# --- how many at once --------------------------------------------------------------------------------------------

_waiting: dict[int, threading.BoundedSemaphore] = {}
_waiting_lock = threading.Lock()
os.register_at_fork(after_in_child=_waiting.clear)  # threads that wait in the parent are not in the fork


@contextlib.contextmanager
def slot(count: int | None = None) -> Iterator[None]:
    """Waits for one of `count` places (default: one per processor), shared by all processes of this user.

    verl scores in several processes with many threads each. A place is a locked file, so a process that dies gives its
    place back.
    """
    count = count or len(os.sched_getaffinity(0))
    with _waiting_lock:
        here = _waiting.setdefault(count, threading.BoundedSemaphore(count))
    folder = Path(tempfile.gettempdir()) / f"verl_sspo_sandbox_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.is_symlink():
        raise SandboxError(f"{folder} belongs to another user: remove it, or set TMPDIR")
    with here:
        while True:
            for place in random.sample(range(count), count):
                with open(folder / f"place{place}", "w") as lock:
                    try:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        continue
                    yield
                    return
            time.sleep(0.005)


def check() -> None:
    """Starts a sandbox and runs `print(1)` in it; the doctor calls this.

    Raises:
        SandboxError: The sandbox does not work on this host; the message says what to do.
    """
    (result,) = run_cases("print(1)", [{"stdin": b""}], Limits())
    if result != ("", b"1\n"):
        raise SandboxError(f"a program that prints 1 gave {result} in the sandbox")


# --- running programs --------------------------------------------------------------------------------------------


def run_cases(program: str, cases: list[dict[str, Any]], limits: Limits) -> Generator[tuple[str, bytes], None, None]:
    """Runs a program once per case, each time in a fresh process.

    Args:
        program: Python source.
        cases: `{"stdin": bytes}`, or `{"call": (function name, list of arguments)}`.
        limits: What the program may use.

    Yields:
        For each case an error ("" if it ended well) and the output: the printed text, or the encoded result. Stops
        early if the program took its runner down.

    Raises:
        SandboxError: The sandbox does not work here.
        TimeoutError: `program_timeout` is over.
        ValueError: The program wrote into its runner's channel.
    """
    request = {"role": "cases", "program": program, "cases": cases}
    with _started(request, limits) as process:
        frames = _frames(process, limits, time.monotonic() + limits.program_timeout)
        for _, frame in zip(cases, frames, strict=False):
            error, _, output = frame.partition(b"\0")
            yield error[:200].decode(), output


def run_checks(
    sources: list[str],
    checks: list[str],
    limits: Limits,
    *,
    context: list[str],
    entry_point: str | None = None,
    all_checks: bool = False,
) -> Verdict:
    """Runs a data set's checks in one sandbox against the functions of a program in another.

    Calls and results travel between the two as plain data, on two pipes. The verdict leaves on a third, which the
    program never sees. Without a verdict, no test passed.

    Args:
        sources: Hostile Python sources, run one after the other in the same module.
        checks: Python statements; each passes if it raises nothing.
        limits: What each of the two may use.
        context: Source that runs before the checks, in their sandbox.
        entry_point: Function that the checks also know as `candidate`.
        all_checks: Continue after a check fails.

    Raises:
        SandboxError: The sandbox does not work here.
    """
    deadline = time.monotonic() + limits.program_timeout
    with contextlib.ExitStack() as stack:
        calls, ask = os.pipe()
        answers, answer = os.pipe()
        serving = {"role": "program", "sources": sources, "calls": calls, "answers": answer}
        checking = {"role": "checker", "checks": checks, "context": context, "calls": ask, "answers": answers}
        checking |= {"entry_point": entry_point, "all_checks": all_checks}
        try:
            server, checker = (
                stack.enter_context(_started(request, limits, descriptors))
                for request, descriptors in ((serving, (calls, answer)), (checking, (ask, answers)))
            )
        finally:
            for descriptor in (calls, ask, answers, answer):
                os.close(descriptor)
        try:
            verdict = next(_frames(checker, limits, deadline), None)
            if verdict is None:
                next(_frames(server, limits, deadline), None)  # raises if the program's sandbox did not start
        except TimeoutError:
            return Verdict(0, len(checks), "timeout")
        return Verdict(*decode(verdict)) if verdict else Verdict(0, len(checks), "the checks ended early")
