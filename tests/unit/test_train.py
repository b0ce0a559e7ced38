"""`verl-sspo train` with a stand-in for main_ppo. The end-to-end tests start the real one."""

import errno
import json
import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest
from filelock import FileLock
from omegaconf import OmegaConf

from verl_sspo.doctor import Finding
from verl_sspo.run import launch, result, train
from verl_sspo.run.folder import attempts
from verl_sspo.run.task import whole_paths

# Saves a checkpoint per step, and fails at the step that is in the file `fail_at`.
MAIN_PPO = """
import json, os, pathlib, sys, zipfile
given = dict(each.lstrip("+").split("=", 1) for each in sys.argv[1:] if "=" in each)
path = lambda key: pathlib.Path(given[key].strip("'").replace("\\\\'", "'"))
saved, answers = path("trainer.default_local_dir"), path("trainer.validation_data_dir")
total = given["trainer.total_training_steps"]
print(f"Total training steps: {total}", flush=True)
print("RAY_ADDRESS", os.environ["RAY_ADDRESS"], sys.argv, flush=True)
record, fail_at = saved / "latest_checkpointed_iteration.txt", pathlib.Path("fail_at")
first = int(record.read_text()) + 1 if record.exists() else 0
with open(os.environ["VERL_FILE_LOGGER_PATH"], "w") as metrics:
    for step in range(first, int(total) + 1):
        if fail_at.exists() and step == int(fail_at.read_text()):
            sys.exit("OutOfMemoryError")
        answers.mkdir(exist_ok=True)
        dump = [{"input": f"{i}+1=", "output": f"{step}", "score": 0.5, "gts": ""} for i in range(4)]
        (answers / f"{step}.jsonl").write_text("\\n".join(map(json.dumps, dump)))
        if step:
            (saved / f"global_step_{step}" / "actor").mkdir(parents=True)
            for name in ("actor/model_world_size_1_rank_0.pt", "data.pt"):
                zipfile.ZipFile(saved / f"global_step_{step}" / name, "w").close()
            record.write_text(str(step))
        data = {"critic/score/mean": 0.5, "actor/entropy": 0.1, "timing_s/step": 1.5} if step else {}
        print(json.dumps({"step": step, "data": {"val-core/a/acc/mean@1": 0.25} | data}), file=metrics, flush=True)
"""


CHECK = train._check


@pytest.fixture(autouse=True)
def stand_in(tmp_path, monkeypatch):
    """An empty current folder, main_ppo as above, and a doctor that finds nothing."""
    folder = tmp_path / "stand-in" / "verl" / "trainer"
    folder.mkdir(parents=True)
    for package in (folder.parent, folder):
        (package / "__init__.py").touch()
    (folder / "main_ppo.py").write_text(textwrap.dedent(MAIN_PPO))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stand-in"))
    for name in ("RAY_ADDRESS", "RUN_DIR", "FORCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(train, "_check", lambda *_: [])
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


STEPS = "trainer.total_training_steps=3"
RUN = Path("runs/quickstart/sspo")


def test_to_the_end_and_again(capsys):
    assert train.main(["quickstart", STEPS]) == 0
    shown = capsys.readouterr()
    assert "quickstart: SSPO, arctan gate of the log-ratio, temperatures 10 and 12" in shown.err
    assert "each step: 32 prompts x 8 responses, 4 updates" in shown.err
    assert "1/3    0.500      0.250    0.100      1.5" in shown.err
    assert json.loads((RUN / "summary.json").read_text())["steps"] == 3
    # A sample of the answers, where things are, how to continue.
    assert "0+1=\n  step    0  0.5    0\n  step    3  0.5    3\n" in shown.out
    assert f"checkpoints   {RUN}/checkpoints" in shown.out
    assert f"verl-sspo evaluate {RUN}/checkpoints/global_step_3 --recipe quickstart\n" in shown.out
    (longer,) = (line for line in shown.out.splitlines() if line.startswith("train longer"))
    assert re.findall(r"total_training_steps=\S+", longer) == ["total_training_steps=N"]
    assert max(map(len, shown.err.splitlines())) <= 80

    assert train.main(["quickstart", STEPS]) == 0
    shown = capsys.readouterr()
    assert "is trained to step 3 of 3" in shown.err
    assert "validation accuracy" in shown.out
    assert attempts(RUN) == []

    # With more steps it resumes. If it starts anew, the earlier run is renamed.
    assert train.main(["quickstart", "trainer.total_training_steps=4"]) == 0
    assert "Resuming from the checkpoint of step 3" in capsys.readouterr().err
    assert json.loads((RUN / "summary.json").read_text())["steps"] == 4
    assert train.main(["quickstart", "trainer.total_training_steps=2", "trainer.resume_mode=disable"]) == 0
    assert json.loads((RUN / "summary.json").read_text())["steps"] == 2
    (earlier,) = RUN.parent.glob("sspo-2*")
    assert json.loads((earlier / "summary.json").read_text())["steps"] == 4


def test_a_failed_run_names_the_command_that_resumes_it(stand_in, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["verl-sspo"])
    Path("fail_at").write_text("2")
    run_dir = "Jürgen's runs [1]"
    assert train.main(["quickstart", STEPS, "--run-dir", run_dir]) == 1
    shown = capsys.readouterr().err
    assert "OutOfMemoryError" in shown
    assert "failed with exit code 1" in shown
    said, command = shown.splitlines()[-2:]
    assert said == "This command resumes from step 1:"
    words = shlex.split(command)
    assert words[-5:] == ["train", "quickstart", "--run-dir", run_dir, STEPS]

    for changed, key in (
        (["algo=gspo"], "actor_rollout_ref.actor.policy_loss.loss_mode: sspo there, gspo now"),
        (["actor_rollout_ref.actor.policy_loss.tau_pos=3"], "policy_loss.tau_pos: 10.0 there, 3 now"),
    ):
        assert train.main([*words[-4:], *changed]) == 2
        assert key in capsys.readouterr().err
    assert attempts(Path(run_dir)) == []

    Path("fail_at").unlink()
    assert train.main([*words[-4:], "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=8192"]) == 0
    shown = capsys.readouterr()
    assert "Resuming from the checkpoint of step 1" in shown.err
    assert "--recipe quickstart actor_rollout_ref.actor.ppo_max_token_len_per_gpu=8192\n" in shown.out
    assert len(attempts(Path(run_dir))) == 1
    assert json.loads((Path(run_dir) / "summary.json").read_text())["steps"] == 3


def test_a_run_without_a_checkpoint_starts_anew(capsys):
    Path("fail_at").write_text("0")
    assert train.main(["quickstart", STEPS]) == 1
    assert "This command starts anew, no checkpoint was saved" in capsys.readouterr().err
    Path("fail_at").unlink()
    assert train.main(["quickstart", STEPS]) == 0
    assert "The earlier run is now" in capsys.readouterr().err


def test_the_second_start_in_a_run_folder_is_refused(capsys):
    RUN.parent.mkdir(parents=True)
    with FileLock(RUN.with_name(".sspo.lock")):
        assert train.main(["quickstart", STEPS]) == 2
    assert "another start is training in" in capsys.readouterr().err
    assert not RUN.exists()
    assert train.main(["quickstart", STEPS]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gsm8kk"], "there is no recipe gsm8kk: did you mean gsm8k?"),
        (["quickstart", "algo=grop"], "Could not find 'algo/grop' Available options in 'algo': dr_grpo gmpo grpo"),
        (["quickstart", "data.train_batchsize=3"], "Could not override 'data.train_batchsize'"),
        (["quickstart", "data.seed"], "missing EQUAL"),
        (["quickstart", "task.digits=1"], "only 81 have 1 digit"),
        (["gsm8k", "hardware=cpu", "model=tiny"], "no data at data/gsm8k/test.parquet, data/gsm8k/train.parquet"),
        (["gsm8k", "data.train_files=5", "data.val_files=null"], "no data at 5: "),
        (["quickstart", "--run-dir", "/proc/none/run"], "/proc/none: "),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(train, "_check", CHECK)
    assert train.main(arguments) == 2
    checking, *_, why = capsys.readouterr().err.splitlines()
    assert checking == "Checking settings, data and model"
    assert why.startswith("Not started: ")
    assert said in why
    assert not list(Path("runs").rglob("train.log"))


def test_what_the_doctor_refuses_is_not_started(capsys, monkeypatch):
    monkeypatch.setattr(train, "_check", CHECK)
    assert train.main(["quickstart", "actor_rollout_ref.actor.policy_loss.tau_pos=-1"]) == 2
    assert "tau_pos=-1 must be a finite number > 0" in " ".join(capsys.readouterr().err.split())
    assert not RUN.exists()


def test_base_is_no_recipe(capsys):
    assert train.main(["nothing"]) == 2
    assert "has code, gsm8k, gsm8k_deepmath, math, quickstart" in capsys.readouterr().err


def test_errors_of_the_doctor_stop_a_run_unless_it_is_forced(monkeypatch, capsys):
    monkeypatch.setattr(train, "_check", lambda *_: [Finding("error", "gate", "is wrong", "correct it")])
    assert train.main(["quickstart", STEPS]) == 2
    assert "train despite them with --force" in capsys.readouterr().err
    assert not RUN.exists()
    assert train.main(["quickstart", STEPS, "--force"]) == 0
    assert json.loads((RUN / "doctor.json").read_text())[0]["check"] == "gate"


def test_an_interrupt_is_no_finding(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "_check", interrupted)
    monkeypatch.setenv("FORCE", "1")
    assert train.main(["quickstart", STEPS]) == 130
    assert "Interrupted before the training had started" in capsys.readouterr().err
    assert not RUN.exists()


def test_a_full_disk_is_told_before_the_start(monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/quickstart/sspo/checkpoints/settings.yaml")

    monkeypatch.setattr(train.settings, "keep", full)
    assert train.main(["quickstart", STEPS]) == 2
    assert "settings.yaml: No space left on device" in capsys.readouterr().err


def test_a_disk_that_fills_after_the_last_step(monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    write = result.write_atomically
    monkeypatch.setattr(result, "write_atomically", full)
    assert train.main(["quickstart", STEPS]) == 1
    shown = capsys.readouterr().err
    assert "Not started" not in shown
    assert f"{RUN.resolve()}: No space left on device" in shown
    assert "This command shows the result: the training is complete, step 3 of 3 is saved:" in shown

    monkeypatch.setattr(result, "write_atomically", write)
    assert train.main(shlex.split(shown.splitlines()[-1])[2:]) == 0
    assert json.loads((RUN / "summary.json").read_text())["steps"] == 3


def test_on_a_running_cluster(monkeypatch):
    """Options for a new cluster are not passed. Variables and paths reach the workers, which do not inherit ours."""
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("VERL_LOGGING_LEVEL", "DEBUG")
    rows = Path("data/arithmetic/digits3-seed0/train.parquet")
    rows.parent.mkdir(parents=True)
    rows.touch()
    Path("reward.py").touch()
    assert train.main(["quickstart", STEPS, "reward.custom_reward_function.path=reward.py"]) == 0
    log = (RUN / launch.LOG).read_text()
    assert "RAY_ADDRESS 10.0.0.1:6379" in log
    assert "'ray_kwargs.ray_init.num_cpus=null', 'ray_kwargs.ray_init.num_gpus=null'" in log
    variables = "++ray_kwargs.ray_init.runtime_env.env_vars"
    assert f"{variables}.VERL_FILE_LOGGER_PATH='{(RUN / launch.METRICS).resolve()}'" in log
    assert f"{variables}.VERL_LOGGING_LEVEL='DEBUG'" in log
    assert f"data.train_files={rows.resolve()}" in log
    assert f"reward.custom_reward_function.path={Path('reward.py').resolve()}" in log
    # Nothing that is not a file here.
    assert "custom_sampler.path" not in log
    assert "_temp_dir" not in log


def test_paths_for_workers_with_another_working_folder():
    Path("a").touch()
    paths = {"data": {"train_files": ["a", "hdfs://b"], "val_files": "absent"}, "model": {"path": "/", "name": "a"}}
    assert whole_paths(OmegaConf.create(paths)) == {"data.train_files": [str(Path("a").resolve()), "hdfs://b"]}


def test_a_run_folder_that_is_a_file(capsys):
    Path("file").touch()
    with pytest.raises(SystemExit):
        train.main(["quickstart", STEPS, "--run-dir", "file"])
    assert "is not a folder to write to" in capsys.readouterr().err


def test_without_a_task_the_error_names_the_task_alone(capsys):
    with pytest.raises(SystemExit):
        train.main([])
    said = capsys.readouterr().err
    assert "required: TASK" in said
    assert "OVERRIDE" not in said.splitlines()[-1]
