"""verl_sspo.quickstart with the real main_ppo: what it leaves when it ends, and what is gone when it is stopped."""

import functools
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from processes import of_run

from verl_sspo.quickstart import command as quickstart
from verl_sspo.run.processes import RUN_ID

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]

ROOT = Path(__file__).parents[2]
SMALL = [
    "task.digits=2",
    "trainer.total_training_steps=2",
    "trainer.test_freq=2",
    "data.train_batch_size=8",
    "data.val_max_samples=32",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.rollout.n=4",
]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return tmp_path_factory.mktemp("arithmetic") / "digits2-seed0"


def command(run, task, *overrides):
    return [sys.executable, "-m", "verl_sspo", "quickstart", *arguments(run, task, *overrides)]


def arguments(run, task, *overrides):
    return [f"--run-dir={run}", f"task.folder={task}", *SMALL, *overrides]


def run_id(launcher):
    """What all processes of the launcher's run inherit."""
    children = psutil.Process(launcher.pid).children()
    (main,) = (child for child in children if "verl.trainer.main_ppo" in child.cmdline())
    return main.environ()[RUN_ID]


def steps_of(run):
    """Lines of metrics that the run has written."""
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def test_quickstart_then_again_and_interrupted(tmp_path, task, capsys):
    run = tmp_path / "run"
    saved = "trainer.save_freq=2"
    ended = subprocess.run(command(run, task, saved), cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert ended.returncode == 0, ended.stderr

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
    assert summary["steps"] == 2
    assert 0 < summary["seconds_per_step"] < summary["seconds"]
    assert 0 <= summary["accuracy_before"] <= 1
    assert summary["entropy_before"] > 0
    # Later mini-batches of a rollout are off-policy, so the gate attenuates something, but not much in two steps.
    assert 0.5 < summary["effective_update_ratio"] < 1

    # The flood is in the log, progress and result are on the screen.
    assert str(run / "curves.png") in ended.stdout
    assert f"{summary['accuracy_before']:.3f} → {summary['accuracy_after']:.3f}" in ended.stdout
    assert re.search(r"^ +2/2 +\d\.\d{3} +\d\.\d{3} +\d\.\d{3} +\d+\.\d +0:00$", ended.stderr, re.MULTILINE)
    assert str(run / "train.log") in ended.stderr
    assert "answers of the first and the last validation" in ended.stdout
    assert len(ended.stderr.splitlines()) < 40
    assert len((run / "train.log").read_text().splitlines()) > 200
    assert (run / "curves.png").stat().st_size > 10_000
    assert (run / "hydra" / ".hydra" / "config.yaml").exists()

    # The same command says at once that the run is complete.
    assert quickstart.main(arguments(run, task, saved)) == 0
    assert "is trained to step 2 of 2" in capsys.readouterr().err
    assert not list(run.glob("attempt-*"))

    # What another run has saved is not written over.
    elsewhere = f"trainer.default_local_dir={run / 'checkpoints'}"
    assert quickstart.main(arguments(tmp_path / "other", task, elsewhere, "trainer.resume_mode=disable")) == 2
    assert f"{run / 'checkpoints'} has checkpoints of another run" in " ".join(capsys.readouterr().err.split())

    # Anew: the first run is renamed, the task is not made again, and the run is interrupted as it trains.
    weights = task / "model" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    # A shell's background job ignores SIGINT, and passes that on.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    second = subprocess.Popen(
        command(
            run,
            task,
            "trainer.total_training_steps=100",
            "trainer.val_before_train=false",
            "trainer.resume_mode=disable",
        ),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed,
    )
    try:
        deadline = time.monotonic() + 900
        while not (list(tmp_path.glob("run-*")) and steps_of(run) >= 2):
            assert second.poll() is None, second.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        # main_ppo, raylet, gcs_server, TaskRunner, the trainer's worker, the rollout's server and more.
        run_of_second = run_id(second)
        assert len(of_run(run_of_second)) > 6
    finally:
        second.send_signal(signal.SIGINT)
        _, shown = second.communicate(timeout=180)
    assert second.returncode == 130, shown
    assert "This command starts anew, no checkpoint was saved" in shown
    assert of_run(run_of_second) == set()
    assert weights.stat().st_mtime_ns == written
    (aside,) = tmp_path.glob("run-*")
    assert json.loads((aside / "summary.json").read_text()) == summary
