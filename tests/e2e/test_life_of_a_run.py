"""The life of a run with the real main_ppo: killed, interrupted, resumed, completed, and what it leaves behind.

After kill -9 of one of its processes the launcher says so, no process is left, and the same command resumes.
"""

import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import pytest
from processes import of_run

from verl_sspo.quickstart import command as quickstart
from verl_sspo.quickstart.model import prepare_arithmetic
from verl_sspo.report.summary import read_attempts, read_metrics
from verl_sspo.run import checkpoints
from verl_sspo.run.folder import attempts
from verl_sspo.run.processes import RUN_ID, is_alive

pytestmark = pytest.mark.e2e

# Which process is killed, and what the user then reads. The driver is main_ppo with its actor TaskRunner.
DIED = (
    r"{victim}[\w.]* \(process \d+\) was killed or crashed(: verl's main_ppo failed with exit code 1"
    # The launcher sends SIGTERM, and Ray's handler for it may abort.
    r"| and verl did not end in 10 s: verl's main_ppo was ended by SIG(TERM|ABRT))"
)
VICTIMS = {
    "launcher": "",
    # Ctrl-C, not a kill.
    "Ctrl-C": "Interrupted. Log: ",
    "main_ppo": "verl's main_ppo was ended by SIGKILL",
    **{victim: DIED.format(victim=victim) for victim in ("TaskRunner", "WorkerDict", "HFServer")},
}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The quickstart's task, with a model trained for a tenth of the time: these tests do not depend on learning."""
    folder = prepare_arithmetic(tmp_path_factory.mktemp("arithmetic"), digits=2, warm_up_steps=60)
    record = folder / "made_with.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"warm_up_steps": 600}))
    return folder


STARTED = []


@pytest.fixture(autouse=True)
def no_start_outlives_its_test():
    yield
    while STARTED:
        process = STARTED.pop()
        # The launcher then ends its run. If the launcher has ended already, this does nothing.
        process.terminate()
        process.wait()


@dataclass
class Start:
    """A start of `verl-sspo quickstart` in a run folder, and its processes."""

    run: Path
    process: subprocess.Popen

    def main(self):
        """The process of main_ppo, or None."""
        children = psutil.Process(self.process.pid).children()
        return next((p for p in children if "verl.trainer.main_ppo" in title(p)), None)

    def find(self, victim):
        """The process to kill, or None if it has not started."""
        main = self.main()
        if victim in ("launcher", "Ctrl-C") or main is None:
            return main and psutil.Process(self.process.pid)
        if victim == "main_ppo":
            return main
        return next((p for p in main.children(recursive=True) if title(p).startswith(f"ray::{victim}")), None)

    def steps(self):
        """The training steps that it has logged."""
        metrics = self.run / "metrics.jsonl"
        return trained(metrics.read_text()) if metrics.exists() else []


def trained(text):
    """The training steps in a metrics file, without steps that are only a validation."""
    lines = map(json.loads, text.split("\n")[:-1])
    return [line["step"] for line in lines if "actor/grad_norm" in line["data"]]


def title(process):
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def arguments(run, task, steps, *more):
    return [
        f"--run-dir={run}",
        f"task.folder={task}",
        "task.digits=2",
        f"trainer.total_training_steps={steps}",
        "trainer.save_freq=1",
        "trainer.test_freq=100",
        "trainer.val_before_train=false",
        "data.train_batch_size=8",
        "data.val_max_samples=8",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.rollout.n=4",
        *more,
    ]


def start(run, task, steps, *more):
    command = [sys.executable, "-m", "verl_sspo", "quickstart", *arguments(run, task, steps, *more)]
    shown = run.with_suffix(".shown").open("w")
    # Background jobs of a shell ignore SIGINT, and child processes inherit that.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    STARTED.append(subprocess.Popen(command, stdout=shown, stderr=subprocess.STDOUT, preexec_fn=heed))
    return Start(run, STARTED[-1])


def start_until_there(victim, run, task, steps, *more):
    """Starts and waits until the victim exists. Starts again if Ray gave up because the machine is overloaded."""
    while True:
        started = start(run, task, steps, *more)
        while started.process.poll() is None:
            if started.find(victim):
                return started
            time.sleep(0.2)
        shown = run.with_suffix(".shown").read_text()
        assert re.search("node timed out during startup|worker.* based on the killing policy", shown), shown


def wait_for(condition, started, seconds):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert started.process.poll() is None, started.run.with_suffix(".shown").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return found


def kill(started, victim, patience):
    """Kills the victim, waits until all processes of the run have ended, and returns what happened.

    Args:
        patience: seconds that this may take.
    """
    process = wait_for(lambda: started.find(victim), started, patience)
    run_id = started.main().environ()[RUN_ID]
    family = of_run(run_id) | set(started.main().children(recursive=True))
    logged, saved = started.steps(), checkpoints.last(started.run / "checkpoints")
    process.send_signal(signal.SIGINT if victim == "Ctrl-C" else signal.SIGKILL)
    killed = time.monotonic()
    code = started.process.wait(timeout=patience)
    # The guard of a killed launcher needs a moment to end the run.
    while (left := of_run(run_id) | {p for p in family if is_alive(p)}) and time.monotonic() < killed + patience:
        time.sleep(0.2)
    return {
        "victim": victim,
        "processes": len(family),
        "logged": max(logged, default=None),
        "checkpoint_when_killed": saved,
        "exit": code,
        "seconds": round(time.monotonic() - killed, 1),
        "orphans": sorted(str(p) for p in left),
        "shown": started.run.with_suffix(".shown").read_text(),
    }


def check(outcome):
    victim = outcome["victim"]
    assert outcome["orphans"] == []
    assert outcome["exit"] == {"launcher": -signal.SIGKILL, "Ctrl-C": 130}.get(victim, 1)
    assert re.search(VICTIMS[victim], " ".join(outcome["shown"].split()))
    step = outcome["checkpoint_when_killed"]
    if step is not None and victim != "launcher":
        assert "This command resumes from step" in outcome["shown"]


def check_resumed(run, step, shown):
    """Checks that the last start in `run` resumed from the checkpoint of `step` (None: started anew)."""
    first = trained((run / "metrics.jsonl").read_text())[0]
    if step is None:
        assert "Resuming" not in shown
        assert first == 1
    else:
        assert f"Resuming from the checkpoint of step {step}\n" in shown
        assert first == step + 1


def end(started, steps, patience, resumed_from=()):
    """Waits for the end of the run and checks what it trained."""
    run = started.run
    assert started.process.wait(timeout=patience) == 0, run.with_suffix(".shown").read_text()
    assert checkpoints.last(run / "checkpoints") == steps
    logged = read_attempts([*attempts(run), run])["actor/grad_norm"].dropna().index
    assert json.loads((run / "summary.json").read_text())["steps"] == len(logged)
    # verl logs a step after its checkpoint. If it is killed in between, no metrics have that step.
    assert set(range(1, steps + 1)).difference(logged) <= set(resumed_from)


@pytest.mark.timeout(3600)
def test_quickstart_on_two_ranks_killed_then_interrupted_then_to_its_end(tmp_path, task, capsys):
    """For killed launchers see test_launch.py and `test_kills_at_random_points`."""
    run, steps = tmp_path / "run", 6
    options = ["trainer.n_gpus_per_node=2", "trainer.val_before_train=true"]
    first = start_until_there("HFServer", run, task, steps, *options)
    wait_for(lambda: 1 in first.steps(), first, 600)
    check(kill(first, "HFServer", patience=600))
    # As if verl had been killed after it emptied its record and before it wrote it, and half of a newer checkpoint.
    killed_at = checkpoints.last(run / "checkpoints")
    (run / "checkpoints" / checkpoints.RECORD).write_text("")
    half = run / "checkpoints" / f"global_step_{killed_at + 1}"
    half.mkdir(exist_ok=True)
    (half / "data.pt").write_bytes(b"PK")

    second = start(run, task, steps, *options)
    wait_for(lambda: killed_at + 1 in second.steps(), second, 600)
    check_resumed(run, killed_at, run.with_suffix(".shown").read_text())
    check(kill(second, "Ctrl-C", patience=600))
    interrupted_at = checkpoints.last(run / "checkpoints")

    end(start(run, task, steps, *options), steps, patience=1200, resumed_from=[killed_at, interrupted_at])
    shown = run.with_suffix(".shown").read_text()
    check_resumed(run, interrupted_at, shown)
    check_result(run, steps, shown)

    # The same command says at once that the run is complete.
    assert quickstart.main(arguments(run, task, steps, *options)) == 0
    assert f"is trained to step {steps} of {steps}" in capsys.readouterr().err
    # Checkpoints of another run are not overwritten.
    elsewhere = [f"trainer.default_local_dir={run / 'checkpoints'}", "trainer.resume_mode=disable"]
    assert quickstart.main(arguments(tmp_path / "other", task, steps, *elsewhere)) == 2
    assert f"{run / 'checkpoints'} has checkpoints of another run" in " ".join(capsys.readouterr().err.split())


def check_result(run, steps, shown):
    """Checks the files of a quickstart, and what it shows at its end."""
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary) == [
        "accuracy_before",
        "accuracy_after",
        "entropy_before",
        "entropy_after",
        "effective_update_ratio",
        "steps",
        "seconds_per_step",
        "seconds",
    ]
    assert 0 < summary["seconds_per_step"] < summary["seconds"]
    assert 0 <= summary["accuracy_before"] <= 1
    assert summary["entropy_before"] > 0
    # Later mini-batches of a rollout are off-policy, so the gate attenuates something, but not much in a few steps.
    assert 0.5 < summary["effective_update_ratio"] < 1

    # The log has all output, the screen shows progress and result.
    assert f"{summary['accuracy_before']:.3f} → {summary['accuracy_after']:.3f}" in shown
    assert re.search(rf"^ +{steps}/{steps} +\d\.\d{{3}} +\d\.\d{{3}} +\d\.\d{{3}} +\d+\.\d +0:00$", shown, re.MULTILINE)
    assert str(run / "train.log") in shown
    assert "answers of the first and the last validation" in shown
    assert str(run / "curves.png") in shown
    assert len(shown.splitlines()) < 80
    assert len((run / "train.log").read_text().splitlines()) > 200
    assert (run / "curves.png").stat().st_size > 10_000
    assert (run / "hydra" / ".hydra" / "config.yaml").exists()

    # Rollout and actor agree although each step changes the weights: they were synchronised, also after a resume.
    logged = read_attempts([*attempts(run), run])
    assert logged["training/rollout_probs_diff_max"].max() < 1e-5
    shards = {path.name for path in (run / "checkpoints" / f"global_step_{steps}" / "actor").glob("model_*.pt")}
    assert shards == {"model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"}


def test_an_unreadable_data_file_is_told_and_nothing_is_touched(tmp_path, task, capsys):
    run, rows = tmp_path / "run", tmp_path / "train.parquet"
    rows.write_bytes((task / "train.parquet").read_bytes()[:1000])
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / checkpoints.RECORD).write_text("3")
    assert quickstart.main(arguments(run, task, 4, f"data.train_files={rows}")) == 2
    assert f"{rows} is not readable as parquet" in " ".join(capsys.readouterr().err.split())
    assert (run / "checkpoints" / checkpoints.RECORD).read_text() == "3"


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("chain", range(5))
def test_kills_at_random_points(tmp_path, task, chain):
    """Kills a run KILLS times (default 4), one victim after the other, at random times after the victim has started."""
    chance = random.Random(chain)
    kills = int(os.environ.get("KILLS", "4"))
    run, steps, saved, outcomes, resumed_from = tmp_path / "run", 6 * kills, None, [], []
    for number in range(chain * kills, (chain + 1) * kills):
        victim = [*VICTIMS][number % len(VICTIMS)]
        started = start_until_there(victim, run, task, steps)
        # In a third of the cases during start-up, otherwise in the first steps.
        target = chance.randrange(3)
        wait_for(lambda started=started, target=target: len(started.steps()) >= target, started, 1800)
        time.sleep(chance.uniform(0, 40 if target == 0 else 8))
        shown = run.with_suffix(".shown").read_text()
        if started.steps():
            check_resumed(run, saved, shown)
        elif saved is not None:
            assert f"Resuming from the checkpoint of step {saved}\n" in shown
        outcome = kill(started, victim, patience=600)
        saved = checkpoints.last(run / "checkpoints")
        resumed_from.append(saved)
        record = {"number": number, "target": target, "checkpoint": saved, **outcome}
        with (tmp_path / "kills.jsonl").open("a") as file:
            print(json.dumps(record), file=file)
        outcomes.append(outcome)
    last = start(run, task, steps)
    end(last, steps, patience=1800, resumed_from=resumed_from)
    check_resumed(run, saved, run.with_suffix(".shown").read_text())
    for outcome in outcomes:
        check(outcome)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, task):
    """One mini-batch per rollout: with several, no two runs are equal, because verl's rows are in order of arrival."""
    runs, steps = (tmp_path / "whole", tmp_path / "resumed"), 6
    one_batch = "actor_rollout_ref.actor.ppo_mini_batch_size=8"
    end(start(runs[0], task, steps, one_batch), steps, patience=1200)
    shutil.copytree(*runs)
    for step in (4, 5, 6):
        shutil.rmtree(runs[1] / "checkpoints" / f"global_step_{step}")
    (runs[1] / "checkpoints" / checkpoints.RECORD).write_text("")
    end(start(runs[1], task, steps, one_batch), steps, patience=1200)
    check_resumed(runs[1], 3, runs[1].with_suffix(".shown").read_text())

    whole, resumed = (read_metrics(run / "metrics.jsonl") for run in runs)
    assert list(resumed.index) == [4, 5, 6]
    whole = whole.loc[4:].dropna(axis=1, how="all")
    assert set(resumed) == set(whole)
    names = [name for name in whole if not re.match(r"timing|perf/|actor/perf/", name)]
    assert len(names) > 50
    pd.testing.assert_frame_equal(resumed[names], whole[names], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_full_disk_is_told_and_the_last_checkpoint_stays(tmp_path, task):
    """Checkpoints of 1.7 MB on a file system of 4 MB: the third does not fit."""
    run, disk = tmp_path / "run", tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"needs to mount a file system: {mount.stderr}")
    try:
        started = start(run, task, 4, f"trainer.default_local_dir={disk}")
        assert started.process.wait(timeout=1200) == 1
        shown = " ".join(run.with_suffix(".shown").read_text().split())
        assert "a file could not be written (is the disk full?)" in shown
        assert "This command resumes from step 2" in shown
        assert checkpoints.last(disk) == 2

        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        last = start(run, task, 4, f"trainer.default_local_dir={disk}")
        assert last.process.wait(timeout=1200) == 0
        check_resumed(run, 2, run.with_suffix(".shown").read_text())
        assert checkpoints.last(disk) == 4
    finally:
        subprocess.run(["umount", disk], check=True)
