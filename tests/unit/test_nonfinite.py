"""Non-finite numbers: they are reported once, with what they are, and never averaged away. An option stops the run."""

import logging
import math

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
from verl.workers.config import FSDPActorConfig

import verl_sspo.algorithm.nonfinite
from verl_sspo.config import SSPOPolicyLossConfig


@pytest.fixture(autouse=True)
def nothing_reported_yet(monkeypatch):
    monkeypatch.setattr(verl_sspo.algorithm.nonfinite, "_reported", set())


def loss_of(name=None, value=math.nan, stop=False):
    inputs = {key: torch.full((2, 3), 0.5) for key in ("log_prob", "old_log_prob", "advantages", "rollout_is_weights")}
    # The NaN at the masked position does not count.
    mask = torch.tensor([[True, True, True], [True, True, False]])
    for tensor in inputs.values():
        tensor[1, 2] = math.nan
    if name:
        inputs[name][1, 0] = value
    actor = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=2,
        ppo_micro_batch_size_per_gpu=2,
        loss_agg_mode="seq-mean-token-mean",
        policy_loss=SSPOPolicyLossConfig(loss_mode="sspo", stop_on_nonfinite=stop),
    )
    return get_policy_loss_fn("sspo")(response_mask=mask, loss_agg_mode="seq-mean-token-mean", config=actor, **inputs)


def advantages_of(rewards, **sspo):
    rewards = torch.tensor(rewards)
    return get_adv_estimator_fn("sspo")(
        token_level_rewards=rewards.unsqueeze(-1),
        response_mask=torch.ones(len(rewards), 1, dtype=torch.bool),
        index=np.array(["a", "a", "b", "b"]),
        config=OmegaConf.create({"sspo": sspo}),
    )[0]


@pytest.mark.parametrize("name", ["log_prob", "old_log_prob", "advantages", "rollout_is_weights"])
def test_one_warning_says_what_and_where_and_metrics_count_on(name, caplog):
    with caplog.at_level(logging.WARNING):
        loss, metrics = loss_of(name)
        loss_of(name)
    assert loss.isnan()
    assert metrics["sspo/nonfinite"].aggregate() == pytest.approx(1 / 5)
    (record,) = caplog.records
    assert f"{name}: 1 of 5 valid values are unusable (1 NaN), the first at (1, 0)" in record.getMessage()


def test_another_input_is_reported_too(caplog):
    with caplog.at_level(logging.WARNING):
        loss_of("advantages")
        loss_of("old_log_prob", -math.inf)
    assert len(caplog.records) == 2
    assert "(1 -inf)" in caplog.records[1].getMessage()


def test_finite_inputs_are_silent(caplog):
    with caplog.at_level(logging.WARNING):
        loss, metrics = loss_of(stop=True)
    assert loss.isfinite()
    assert not caplog.records
    assert metrics["sspo/nonfinite"].aggregate() == 0


def test_a_negative_rollout_weight_is_reported(caplog):
    with caplog.at_level(logging.WARNING):
        loss, metrics = loss_of("rollout_is_weights", -0.5)
    assert loss.isnan()
    assert metrics["sspo/nonfinite"].aggregate() == pytest.approx(1 / 5)
    assert "rollout_is_weights: 1 of 5 valid values are unusable (1 negative)" in caplog.records[0].getMessage()


@pytest.mark.parametrize("name", ["log_prob", "old_log_prob", "advantages", "rollout_is_weights"])
def test_the_option_stops_the_run(name):
    with pytest.raises(FloatingPointError, match=rf"{name}: 1 of 5 .* stop_on_nonfinite"):
        loss_of(name, math.inf, stop=True)


def test_rewards_are_reported_by_the_estimator(caplog):
    with caplog.at_level(logging.WARNING):
        advantages = advantages_of([1.0, math.inf, 1.0, 0.0])
        advantages_of([1.0, math.inf, 1.0, 0.0])
    assert advantages[:2].isnan().all()
    assert advantages[2:].isfinite().all()
    (record,) = caplog.records
    assert "rewards: 1 of 4 valid values are unusable (1 +inf), the first at (1,)" in record.getMessage()
    with pytest.raises(FloatingPointError, match="rewards: 1 of 4"):
        advantages_of([1.0, math.nan, 1.0, 0.0], stop_on_nonfinite=True)


def test_huge_rewards_are_no_alarm(caplog):
    """Their sum overflows float32, but they are finite."""
    with caplog.at_level(logging.WARNING):
        advantages_of([3e38, 3e38, 3e38, 0.0])
    assert not caplog.records


def test_a_switch_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"policy_loss.stop_on_nonfinite='yes' must be true or false"):
        SSPOPolicyLossConfig(loss_mode="sspo", stop_on_nonfinite="yes")
    with pytest.raises(ValueError, match=r"algorithm.sspo.stop_on_nonfinite=1 must be true or false"):
        advantages_of([1.0, 0.0, 1.0, 0.0], stop_on_nonfinite=1)
