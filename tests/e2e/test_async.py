"""verl's asynchronous trainers in the real main_ppo: the rollout lags behind, and the recipe decides what sees the lag.

Every batch is one update. With old log-probs from the actor itself, all ratios would therefore be 1.
"""

import json
import math
from pathlib import Path

import pytest

from verl_sspo.quickstart import task as arithmetic
from verl_sspo.run.launch import TrainingFailedError, train

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]

RECIPES = Path(__file__).parents[2] / "recipes"


def run(tmp_path, task, *overrides):
    """Trains and returns the metrics of the last step."""
    overrides = [
        f"task.folder={task}",
        "task.digits=1",
        f"data.max_prompt_length={arithmetic.prompt_length(1)}",
        f"data.max_response_length={arithmetic.response_length(1)}",
        "actor_rollout_ref.rollout.n=8",
        # Steps so large that the lag exceeds rounding errors.
        "actor_rollout_ref.actor.optim.lr=1.0e-3",
        "trainer.val_before_train=false",
        "trainer.test_freq=-1",
        f"trainer.default_local_dir={tmp_path / 'checkpoints'}",
        *overrides,
    ]
    try:
        metrics = train(overrides, tmp_path / "run", config_dir=RECIPES, config_name="quickstart")
    except TrainingFailedError as error:
        pytest.fail(f"{error}\n{error.excerpt}")
    entries = [json.loads(line) for line in metrics.read_text().splitlines()]
    for entry in entries:
        assert all(math.isfinite(value) for value in entry["data"].values() if isinstance(value, int | float))
    return entries[-1]["data"]


def test_separate_async_with_gates_that_see_the_lag(tmp_path, task):
    last = run(
        tmp_path,
        task,
        "+mode=separate_async",
        "+staleness=bypass",
        # Two updates between two transfers of the weights, four updates in total.
        "trainer.v1.separate_async.parameter_sync_step=2",
        "data.train_batch_size=8",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "trainer.total_training_steps=2",
    )
    # The prompts of the second step were drawn before the first step, so their responses are one version old.
    assert last["training/off_policy/trajectory_staleness_worst/max"] == 1
    # The loss is still SSPO's, and its gates see how far the policy has moved since.
    assert last["actor/sspo/abs_log_ratio"] > 1e-4
    assert last["actor/sspo/slope"] < 1
    assert last["actor/sspo/abs_log_weight"] > 0
    assert last["actor/entropy_loss"] > 0
    assert not any(name.startswith("rollout_corr/") for name in last)


@pytest.mark.slow
def test_colocate_async_with_weights_that_see_the_lag(tmp_path, task):
    last = run(
        tmp_path,
        task,
        "+mode=colocate_async",
        "+staleness=decoupled",
        "data.train_batch_size=4",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "trainer.total_training_steps=2",
    )
    # The second step trains on responses that were started before the first step.
    assert last["training/off_policy/trajectory_staleness_worst/max"] == 1
    # The policy has moved since the rollout. The gates do not see this, the rollout-correction weights do.
    assert last["training/rollout_probs_diff_max"] > 1e-2
    assert last["actor/sspo/abs_log_ratio"] < 1e-4
    assert last["actor/sspo/slope"] == pytest.approx(1, abs=1e-6)
    assert last["rollout_corr/rollout_is_std"] > 1e-3
    assert last["actor/entropy"] > 0
