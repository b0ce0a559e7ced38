"""Our agent loop beside verl's own in verl's trainer: the same samples, rewards and log-probabilities."""

import pytest

from verl_sspo.quickstart import task as arithmetic

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]

MANAGER = "actor_rollout_ref.rollout.agent.agent_loop_manager_class"


def test_a_group_by_one_request_is_what_verl_draws_one_by_one(task, train_in_one_cluster):
    def train(*overrides):
        steps = train_in_one_cluster(
            "quickstart",
            f"task.folder={task}",
            "task.digits=1",
            f"data.max_prompt_length={arithmetic.prompt_length(1)}",
            f"data.max_response_length={arithmetic.response_length(1)}",
            *("data.train_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=8"),
            *("trainer.val_before_train=true", "trainer.test_freq=-1", "trainer.total_training_steps=1"),
            *overrides,
        )
        return {key: value for data in steps.values() for key, value in data.items()}

    ours, verl = train(), train(f"{MANAGER}=null")
    # verl's own validation and training, of the same prompts with the same seeds.
    same = [key for key in verl if key.startswith(("val-", "critic/", "prompt_length/", "response_length/"))]
    assert len(same) > 10
    for key in same:
        assert ours[key] == pytest.approx(verl[key], rel=1e-5, abs=1e-6), key
    # One update of the whole batch: the order of the rows does not matter.
    assert ours["actor/grad_norm"] == pytest.approx(verl["actor/grad_norm"], rel=1e-3)
    assert ours["training/rollout_probs_diff_max"] < 1e-5
    assert set(verl) - set(ours) == set()
