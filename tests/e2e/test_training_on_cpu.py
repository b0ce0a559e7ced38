"""The real main_ppo on the CPU: rollout, reward, advantage, FSDP2, weight sync, validation, checkpoint, resume."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from verl_sspo.quickstart.model import prepare_arithmetic

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """One-digit additions and a model that has barely been taught: enough for all of the pipeline."""
    return prepare_arithmetic(
        tmp_path_factory.mktemp("task"), digits=1, train_size=48, val_size=16, warm_up_steps=20, warm_up_batch=16
    )


# Varies within every group of responses, so that every step has a gradient, even from a model that knows nothing.
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return len(set(solution_str)) / 12
"""


def run_main_ppo(task: Path, directory: Path, *overrides: str) -> dict[int, dict[str, float]]:
    """Runs verl's unmodified entry point; returns the metrics of each step that it logged."""
    metrics = directory / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    (directory / "reward.py").write_text(REWARD)
    command = [
        *(sys.executable, "-m", "verl.trainer.main_ppo"),
        *("--config-dir", str(RECIPES), "--config-name", "ppo_trainer", "+algo=sspo", "+hardware=cpu"),
        f"data.train_files={task / 'train.parquet'}",
        f"data.val_files={task / 'val.parquet'}",
        f"actor_rollout_ref.model.path={task / 'model'}",
        "data.train_batch_size=8",
        "data.max_prompt_length=4",
        "data.max_response_length=12",
        "data.dataloader_num_workers=0",
        "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.actor.use_dynamic_bsz=true",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        f"reward.custom_reward_function.path={directory / 'reward.py'}",
        "trainer.logger=[console,file]",
        f"trainer.default_local_dir={directory / 'checkpoints'}",
        "trainer.test_freq=2",
        "trainer.save_freq=2",
        *overrides,
    ]
    # A cluster of its own, whatever Ray left on this host.
    mine = {"VERL_FILE_LOGGER_PATH": str(metrics), "VERL_PLATFORM": "cpu", "RAY_ADDRESS": "local"}
    environment = {**os.environ, **mine}
    log = directory / "main_ppo.log"
    with log.open("w") as output:
        result = subprocess.run(
            command, env=environment, cwd=directory, stdout=output, stderr=subprocess.STDOUT, timeout=1200, check=False
        )
    assert result.returncode == 0, log.read_text()[-8000:]
    return {line["step"]: line["data"] for line in map(json.loads, metrics.read_text().splitlines())}


def check_training_step(metrics: dict[str, float]) -> None:
    # Rollout and actor agree although the weights change at each step: they were synchronised.
    assert metrics["training/rollout_probs_diff_max"] < 1e-5
    assert metrics["actor/grad_norm"] > 0
    assert 0 < metrics["response_length/mean"] <= 12


def test_two_ranks_with_checkpoint_and_resume(task, tmp_path):
    ranks = "trainer.n_gpus_per_node=2"
    steps = run_main_ppo(task, tmp_path, ranks, "trainer.total_training_steps=2")
    assert steps.keys() == {0, 1, 2}
    validation = [key for key in steps[0] if key.startswith("val-core/")]
    assert validation
    assert set(validation) <= steps[2].keys()
    check_training_step(steps[1])
    check_training_step(steps[2])
    shards = {path.name for path in (tmp_path / "checkpoints" / "global_step_2" / "actor").glob("model_*.pt")}
    assert shards == {"model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"}

    resumed = run_main_ppo(task, tmp_path, ranks, "trainer.total_training_steps=3", "trainer.val_before_train=false")
    assert resumed.keys() == {3}
    check_training_step(resumed[3])
    assert (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "3"
