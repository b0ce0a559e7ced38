"""The launcher with a stand-in for main_ppo. The end-to-end tests start the real one."""

import ast
import functools
import io
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from rich.console import Console

from verl_sspo.run import folder, launch, processes
from verl_sspo.run.processes import running_in
from verl_sspo.run.screen import Screen

# A stand-in that waits for the launcher in vain must not wait forever.
pytestmark = pytest.mark.timeout(600)

# Seconds that a cluster has to end. Those below do not end by themselves.
GRACE = 3


@pytest.fixture
def verl(tmp_path, monkeypatch):
    """A package `verl` whose main_ppo the test writes, with the function that this fixture returns."""
    monkeypatch.setattr(processes, "GRACE", GRACE)
    package = tmp_path / "stand-in" / "verl" / "trainer"
    package.mkdir(parents=True)
    for each in (package.parent, package):
        (each / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stand-in"))
    return lambda source: (package / "main_ppo.py").write_text(textwrap.dedent(source))


def train(tmp_path, overrides=()):
    console = Console(file=(tmp_path / "shown").open("w"), width=200)
    run_dir = tmp_path / "run"
    try:
        return launch.train(overrides, run_dir, config_dir=Path("recipes"), config_name="some", console=console)
    finally:
        console.file.close()


def processes_with(marker):
    found = []
    for process in psutil.process_iter():
        try:
            if marker in process.cmdline():
                found.append(process)
        except psutil.Error:
            pass
    return found


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def launcher_code(tmp_path, before=""):
    """A program that trains in `run`."""
    return f"""
from pathlib import Path
from verl_sspo.run import processes as family, launch
family.GRACE = {GRACE}
{before}
try:
    launch.train([], Path({str(tmp_path / "run")!r}), config_dir=Path("recipes"), config_name="some")
except KeyboardInterrupt:
    raise SystemExit(130)
"""


# Like Ray, starts a process in its own session, and one whose parent has ended.
CLUSTER = """
import subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(600)", MARKER]
subprocess.Popen(sleep, start_new_session=True)
orphan = f"import subprocess; subprocess.Popen({sleep!r}, start_new_session=True)"
subprocess.run([sys.executable, "-c", orphan])
"""


def test_metrics_progress_and_environment(tmp_path, verl, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    verl(
        """
        import json, os, sys
        print("Total training steps: 2", flush=True)
        print("RAY_ADDRESS", os.environ["RAY_ADDRESS"], "arguments", sys.argv[1:])
        accuracy = "val-core/a/acc/mean@1"
        steps = [(0, {accuracy: 0.25}), (1, {"critic/score/mean": 0.5, "timing_s/step": 2.0})]
        # verl writes a NaN as null.
        steps.append((2, {"critic/score/mean": None, accuracy: 1}))
        with open(os.environ["VERL_FILE_LOGGER_PATH"], "w") as file:
            for step, data in steps:
                print(json.dumps({"step": step, "data": data}), file=file)
        """
    )
    metrics = train(tmp_path, ["algo=gspo"])
    assert metrics == tmp_path / "run" / "metrics.jsonl"
    assert len(metrics.read_text().splitlines()) == 3
    log = (tmp_path / "run" / "train.log").read_text()
    assert "RAY_ADDRESS local" in log
    assert "'--config-dir', 'recipes', '--config-name', 'some'" in log
    assert "'algo=gspo'" in log
    shown = (tmp_path / "shown").read_text()
    lines = [line.split() for line in shown.splitlines()]
    assert ["step", "reward", "validation", "entropy", "seconds", "time", "left"] in lines
    assert ["0/2", "0.250"] in lines
    assert ["1/2", "0.500", "2.0", "0:02"] in lines
    assert ["2/2", "nan", "1.000", "0:00"] in lines
    # Ray's temporary folder is gone.
    (ray_dir,) = re.findall(r"_temp_dir=\\?'([^'\\]+)", log)
    assert not Path(ray_dir).exists()


def test_failure_shows_the_traceback_and_ends_the_cluster(tmp_path, verl):
    marker = f"marker-{tmp_path.name}-{os.getpid()}"
    verl(
        CLUSTER.replace("MARKER", repr(marker))
        + """
print("noise\\n" * 100)
print("\\x1b[36m(TaskRunner pid=7)\\x1b[0m Traceback (most recent call last):")
print("\\x1b[36m(TaskRunner pid=7)\\x1b[0m ValueError: tau_pos must be positive", flush=True)
sys.exit(3)
"""
    )
    with pytest.raises(launch.TrainingFailedError) as failure:
        train(tmp_path)
    assert failure.value.returncode == 3
    assert failure.value.excerpt == "Traceback (most recent call last):\nValueError: tau_pos must be positive"
    assert str(tmp_path / "run" / "train.log") in str(failure.value)
    assert processes_with(marker) == []


def test_a_run_folder_may_have_any_name(tmp_path, verl):
    seen = tmp_path / "seen"
    verl(f"""
import os, sys, time
print(sys.argv[1:], flush=True)
while not os.path.exists({str(seen)!r}): time.sleep(0.05)
""")
    named = tmp_path / "Jürgen's runs, lr=1e-4 (old) [1] #2"
    found = []

    def watch():
        try:
            wait_for(lambda: found.append(running_in(named)) or found[-1])
        finally:
            seen.touch()

    watcher = threading.Thread(target=watch)
    watcher.start()
    launch.train([], named, config_dir=Path("recipes"), config_name="some", console=Console(file=io.StringIO()))
    watcher.join()
    assert found[-1] is not None
    arguments = ast.literal_eval((named / "train.log").read_text().splitlines()[0])
    [override] = OverridesParser.create().parse_overrides([each for each in arguments if each.startswith("hydra.run")])
    assert override.value() == str(named / "hydra")


def test_log_without_a_traceback_shows_its_end(tmp_path):
    log = tmp_path / "log"
    log.write_text("".join(f"line {i}\n" for i in range(100)))
    assert launch._excerpt(log, lines=2) == "line 98\nline 99"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_no_process(tmp_path, verl, signum):
    marker = f"marker-{tmp_path.name}-{os.getpid()}"
    verl(CLUSTER.replace("MARKER", repr(marker)) + "\ntime.sleep(600)\n")
    # Background jobs of a shell ignore SIGINT, and child processes inherit that.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    launcher = subprocess.Popen([sys.executable, "-c", launcher_code(tmp_path)], preexec_fn=heed)
    wait_for(lambda: len(processes_with(marker)) == 2)
    # A process that looks the same but is not part of the run is not touched.
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", marker])
    try:
        launcher.send_signal(signum)
        assert launcher.wait(timeout=180) == 130
        assert [process.pid for process in processes_with(marker)] == [other.pid]
    finally:
        other.kill()
        other.wait()


def test_what_nohup_ignores_interrupts_nothing():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with launch.signals_interrupt():
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
                os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with launch.signals_interrupt(), pytest.raises(KeyboardInterrupt, match="SIGHUP"):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_closed_terminal_leaves_no_process(tmp_path, verl):
    marker = f"marker-{tmp_path.name}-{os.getpid()}"
    verl(CLUSTER.replace("MARKER", repr(marker)) + "\ntime.sleep(600)\n")
    launcher, terminal = pty.fork()
    if launcher == 0:
        # Under nohup SIGHUP is ignored, and the child inherits that.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.execv(sys.executable, [sys.executable, "-c", launcher_code(tmp_path)])
    wait_for(lambda: len(processes_with(marker)) == 2)
    # As if a connection broke: SIGHUP arrives, and nothing can be written any more.
    os.close(terminal)
    os.waitpid(launcher, 0)
    assert running_in(tmp_path) is None
    assert processes_with(marker) == []


def test_the_impatient_leave_no_process(tmp_path, verl):
    marker = f"marker-{tmp_path.name}-{os.getpid()}"
    verl(CLUSTER.replace("MARKER", repr(marker)) + "\ntime.sleep(600)\n")
    # A second Ctrl-C, while the run is being ended.
    impatient = """
def interrupted(self, main):
    raise KeyboardInterrupt
family.Family.end = interrupted
"""
    launcher = subprocess.Popen([sys.executable, "-c", launcher_code(tmp_path, impatient)])
    wait_for(lambda: len(processes_with(marker)) == 2)
    launcher.terminate()
    assert launcher.wait() == 130
    wait_for(lambda: not processes_with(marker))


def test_killed_launcher_leaves_no_process(tmp_path, verl):
    marker = f"marker-{tmp_path.name}-{os.getpid()}"
    verl(CLUSTER.replace("MARKER", repr(marker)) + "\ntime.sleep(600)\n")
    launcher = subprocess.Popen([sys.executable, "-c", launcher_code(tmp_path)])
    wait_for(lambda: len(processes_with(marker)) == 2)
    assert running_in(tmp_path / "run") is not None
    assert running_in(tmp_path) is not None
    assert running_in(tmp_path / "ru") is None
    (ray_dir,) = re.findall(r"_temp_dir='([^']+)", " ".join(psutil.Process(running_in(tmp_path)).cmdline()))
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not processes_with(marker) and not Path(ray_dir).exists())
    assert running_in(tmp_path) is None
    assert f"the launcher, process {launcher.pid}, is gone" in (tmp_path / "run" / "train.log").read_text()


# Starts a process with the name that Ray gives an actor, kills it, and prints what Ray would print.
DEATH = """
import os, subprocess, sys, time

def wait_for_actors(count):
    while not os.path.exists(f"{sys.argv[-1]}{count}"): time.sleep(0.05)

worker = subprocess.Popen(["ray::HFServer.generate", "-c", "import time; time.sleep(600)"], executable=sys.executable)
wait_for_actors(1)
worker.kill()
worker.wait()
print(f"Worker port: 1 Worker PID: {worker.pid} Worker exit type: SYSTEM_ERROR Worker exit detail: unexpected")
print(worker.pid, file=open(sys.argv[-1], "w"), flush=True)
"""


@pytest.fixture
def seen(tmp_path, monkeypatch):
    """A path: the launcher makes the file <path><n> when it has seen n actors."""
    path, look = tmp_path / "seen", processes.Family.look

    def look_and_tell(family):
        look(family)
        path.with_name(f"seen{len(family._actors)}").touch()

    monkeypatch.setattr(processes.Family, "look", look_and_tell)
    return path


@pytest.mark.parametrize(
    ("then", "said"),
    [
        # verl notices, verl waits forever, verl exits with code 0.
        ("sys.exit(1)", ": verl's main_ppo failed with exit code 1"),
        ("time.sleep(600)", " and verl did not end in 1 s: verl's main_ppo was ended by SIGTERM"),
        ("", ": verl's main_ppo exited with code 0 after a worker died"),
    ],
)
def test_death_of_a_worker_ends_the_run(tmp_path, verl, seen, monkeypatch, then, said):
    monkeypatch.setattr(launch, "PATIENCE", 1 if "sleep" in then else 60)
    verl(DEATH + then)
    with pytest.raises(launch.TrainingFailedError) as failure:
        train(tmp_path, [str(seen)])
    pid = seen.read_text().strip()
    message = f"HFServer.generate (process {pid}) was killed or crashed{said}"
    assert str(failure.value).startswith(message)
    assert f"HFServer.generate (process {pid}) was killed or crashed" in (tmp_path / "shown").read_text()


def test_death_of_a_node_is_told(tmp_path, verl, monkeypatch):
    monkeypatch.setattr(launch, "PATIENCE", 1)
    verl("""
import time
print("ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.")
print("The actor died because its node has died. Node Id: 1f, Ip address: 10.0.0.2", flush=True)
time.sleep(600)
""")
    with pytest.raises(launch.TrainingFailedError, match="a node of the Ray cluster died and verl did not end in 1 s"):
        train(tmp_path, [])


def test_a_failure_after_the_death_of_a_node_names_it(tmp_path, verl):
    verl("""
print("RuntimeError: Connection closed by peer")
print("(raylet) Raylet is terminated. Termination is unexpected.")
print("    [state-dump]     NodeManagerService.grpc_server.FreeLocalObjects - 1 total")
raise SystemExit(1)
""")
    with pytest.raises(launch.TrainingFailedError, match=r"^a node of the Ray cluster died: verl") as failure:
        train(tmp_path, [])
    assert "Connection closed by peer" in failure.value.excerpt
    assert "state-dump" not in failure.value.excerpt


# An actor of the dead worker's class appears, as if Ray had restarted it. Then the run ends without an error.
RESTARTED = """
subprocess.Popen(["ray::HFServer", "-c", "import time; time.sleep(600)"], executable=sys.executable)
wait_for_actors(2)
"""


def test_a_worker_that_ray_has_restarted_does_not_end_the_run(tmp_path, verl, seen, monkeypatch):
    monkeypatch.setattr(launch, "PATIENCE", 60)
    verl(DEATH + RESTARTED)
    train(tmp_path, [str(seen)])
    assert "Ray has restarted HFServer.generate (process" in (tmp_path / "shown").read_text()


def test_processes_that_cannot_be_killed_do_not_hold_the_launcher(monkeypatch):
    """As in state D: SIGKILL is sent, but the process does not end."""
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        monkeypatch.setattr(processes, "GRACE", 1)
        monkeypatch.setattr(psutil.Process, "kill", lambda _: None)
        family = processes.Family("none")
        family.add(sleeper.pid)
        assert [process.pid for process in family.kill()] == [sleeper.pid]
    finally:
        sleeper.kill()
        sleeper.wait()


def test_a_process_that_ends_while_it_is_looked_at_is_passed_over():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    family = processes.Family("none")
    family.add(os.getpid())
    family.look()
    ended.wait()
    family.add(ended.pid)
    assert ended.pid not in [process.pid for process in family.alive()]


def test_rays_folder_is_short_enough_for_its_sockets(tmp_path, verl, monkeypatch):
    usual = tmp_path / ("long" * 10)
    usual.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(usual))
    verl("import sys; print(sys.argv)")
    train(tmp_path)
    (ray_dir,) = re.findall(r"_temp_dir=\\?'([^'\\]+)", (tmp_path / "run" / "train.log").read_text())
    # The most that Ray adds to it: a session, and the name of the longest socket in it.
    socket = f"{ray_dir}/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
    assert len(socket) <= 107


@pytest.mark.parametrize(
    "said", ["OSError: [Errno 28] No space left on device", "TORCH", "nothing: the log is full too"]
)
def test_full_disk_is_told(tmp_path, verl, said, monkeypatch):
    if said.startswith("nothing"):
        monkeypatch.setattr(launch.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    # The error of torch 2.13 when a file system is full.
    said = said.replace("TORCH", "RuntimeError: [enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    verl(f"print('Traceback (most recent call last):'); print({said!r}, flush=True); raise SystemExit(1)")
    with pytest.raises(
        launch.TrainingFailedError, match=r"^a file could not be written .is the disk full.*exit code 1"
    ):
        train(tmp_path)


def test_killed_main_ppo_is_told(tmp_path, verl):
    verl("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(launch.TrainingFailedError, match="verl's main_ppo was ended by SIGKILL") as failure:
        train(tmp_path)
    assert failure.value.returncode == -9


def test_a_start_that_resumes_keeps_what_the_one_before_wrote(tmp_path, verl):
    verl("")
    run_dir = tmp_path / "run"
    for number in range(1, 4):
        train(tmp_path)
        (run_dir / "metrics.jsonl").write_text(str(number))
        (run_dir / "checkpoints").mkdir(exist_ok=True)
        folder.keep_attempt(run_dir)
        assert [path.name for path in run_dir.iterdir() if path.is_file()] == []
    assert [(path / "metrics.jsonl").read_text() for path in folder.attempts(run_dir)] == ["1", "2", "3"]
    assert (run_dir / "checkpoints").is_dir()


def test_run_folder_is_not_written_over(tmp_path, verl):
    verl("")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "train.log").write_text("of an earlier run")
    with pytest.raises(FileExistsError, match="move it aside"):
        train(tmp_path)
    first = folder.move_aside(run_dir)
    assert (first / "train.log").read_text() == "of an earlier run"
    assert not run_dir.exists()
    assert folder.move_aside(run_dir) is None
    # Two runs that ended in the same second get different names.
    run_dir.mkdir()
    times = first.stat().st_mtime, max(path.stat().st_mtime for path in (first, *first.iterdir()))
    os.utime(run_dir, (times[1], times[1]))
    second = folder.move_aside(run_dir)
    assert second.name == f"{first.name}-2"


def test_the_lines_of_a_long_training_fit_into_80_columns(tmp_path):
    output = io.StringIO()
    with Screen(Console(file=output, width=80), total=100_000) as screen:
        data = {
            "critic/score/mean": -12.3456,
            "actor/entropy": 1.5,
            "timing_s/step": 3600.0,
            "val-core/a/acc/mean@8": 1.0,
        }
        screen.step(99_000, data)
    header, line = output.getvalue().splitlines()
    assert len(line) <= 80
    # Time left: 1,000 steps of an hour.
    assert line.split() == ["99000/100000", "-12.346", "1.000", "1.500", "3600.0", "1000:00:00"]
    assert header.endswith("time left")
