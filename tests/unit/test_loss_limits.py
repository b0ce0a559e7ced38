"""Limits in which the loss equals verl's own losses, called as verl calls them."""

import math

import pytest
import torch
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import FSDPActorConfig, PolicyLossConfig

from verl_sspo.algorithm.gates import DOMAINS, SHAPES
from verl_sspo.config import SSPOPolicyLossConfig


def actor_config(policy_loss=None, **options) -> FSDPActorConfig:
    return FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=4,
        policy_loss=policy_loss or PolicyLossConfig(),
        **options,
    )


def run(name, config, log_prob, old_log_prob, advantages, mask, **options):
    leaf = log_prob.clone().requires_grad_()
    loss, metrics = get_policy_loss_fn(name)(
        old_log_prob=old_log_prob,
        log_prob=leaf,
        advantages=advantages,
        response_mask=mask,
        loss_agg_mode="seq-mean-token-mean",
        config=config,
        rollout_is_weights=options.get("rollout_is_weights"),
    )
    loss.backward()
    return loss.detach(), leaf.grad, metrics


def sspo(gate="arctan", domain="log", tau_pos=10.0, tau_neg=12.0, side="both", level="token"):
    settings = {"gate": gate, "gate_domain": domain, "gate_side": side, "gate_level": level}
    return actor_config(SSPOPolicyLossConfig(loss_mode="sspo", tau_pos=tau_pos, tau_neg=tau_neg, **settings))


def batch(rows=5, length=8, scale=0.2, seed=0):
    """Ragged rows. Every response has a valid token, because verl's geo_mean divides by the number of rows."""
    generator = torch.Generator().manual_seed(seed)
    old_log_prob = -torch.rand(rows, length, generator=generator, dtype=torch.float64)
    log_prob = old_log_prob + scale * torch.randn(rows, length, generator=generator, dtype=torch.float64)
    advantages = torch.randn(rows, 1, generator=generator, dtype=torch.float64).expand(rows, length)
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=generator)
    return log_prob, old_log_prob, advantages, mask


NEVER_BINDS = {"clip_ratio_low": 1e6, "clip_ratio_high": 1e6}


@pytest.mark.parametrize("gate", SHAPES)
@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("side", ["both", "forward"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_on_policy_the_gradient_is_that_of_gspo_and_sapo(gate, domain, side, level):
    if (gate, domain, side) == ("sigmoid", "ratio", "forward"):
        pytest.skip("excluded by the specification")
    log_prob, _, advantages, mask = batch()
    _, gradient, metrics = run("sspo", sspo(gate, domain, side=side, level=level), log_prob, log_prob, advantages, mask)
    lengths = mask.sum(-1, keepdim=True)
    torch.testing.assert_close(gradient, -(advantages * mask / lengths) / len(mask))  # A_i / n_i, by hand
    for other in ("gspo", "sapo"):
        _, expected, _ = run(other, actor_config(), log_prob, log_prob, advantages, mask)
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-12)
    assert metrics["sspo/slope"].aggregate() == pytest.approx(1)
    assert metrics["sspo/sequence_weight"].aggregate() == pytest.approx(1)


@pytest.mark.parametrize("gate", SHAPES)
@pytest.mark.parametrize("other", ["gspo", "geo_mean"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_small_temperatures_in_the_log_domain_give_the_unclipped_geometric_mean(gate, other, level):
    arguments = batch()
    loss, gradient, _ = run("sspo", sspo(gate, "log", 1e-4, 1e-4, level=level), *arguments)
    expected = run(other, actor_config(**NEVER_BINDS), *arguments)
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("taus", [(1.0, 1.05), (3.0, 5.0)])
def test_equal_log_ratios_with_the_ratio_sigmoid_give_sapo(taus):
    log_prob, old_log_prob, advantages, mask = batch()
    log_prob = old_log_prob + torch.linspace(-0.5, 0.5, len(log_prob), dtype=torch.float64).unsqueeze(-1)
    loss, gradient, _ = run("sspo", sspo("sigmoid", "ratio", *taus), log_prob, old_log_prob, advantages, mask)
    sapo = actor_config(tau_pos=taus[0], tau_neg=taus[1])
    expected = run("sapo", sapo, log_prob, old_log_prob, advantages, mask)
    torch.testing.assert_close(loss, expected[0], rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-7, atol=1e-12)


def test_one_token_responses_with_the_ratio_sigmoid_are_sapo_exactly():
    log_prob, old_log_prob, advantages, _ = batch(rows=40, length=6, scale=1.0)
    mask = torch.zeros(40, 6, dtype=torch.bool)
    mask[torch.arange(40), torch.arange(40) % 6] = True
    loss, gradient, _ = run("sspo", sspo("sigmoid", "ratio", 1.0, 1.05), log_prob, old_log_prob, advantages, mask)
    expected = run("sapo", actor_config(), log_prob, old_log_prob, advantages, mask)
    torch.testing.assert_close(loss, expected[0], rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("gate", SHAPES)
@pytest.mark.parametrize("side", ["both", "forward"])
def test_with_one_token_or_equal_log_ratios_both_levels_are_one(gate, side):
    log_prob, old_log_prob, advantages, mask = batch()
    one = mask & (mask.cumsum(-1) == 1)
    equal = old_log_prob + torch.linspace(-0.5, 0.5, len(log_prob), dtype=torch.float64).unsqueeze(-1)
    for arguments in ((log_prob, old_log_prob, advantages, one), (equal, old_log_prob, advantages, mask)):
        token, sequence = (run("sspo", sspo(gate, side=side, level=each), *arguments) for each in ("token", "sequence"))
        torch.testing.assert_close(sequence[:2], token[:2])


def test_a_narrow_forward_gate_on_the_sequence_keeps_and_drops_the_responses_that_gspo_does():
    """Responses far inside and far outside verl's clip range, with log-ratios that differ within a response."""
    log_prob, old_log_prob, advantages, mask = batch(rows=40, scale=0.05)
    lengths = mask.sum(-1, keepdim=True)
    z = ((log_prob - old_log_prob) * mask).sum(-1, keepdim=True) / lengths
    target = torch.tensor([1e-5, -1e-5, 0.3, -0.3], dtype=torch.float64).repeat(10).unsqueeze(-1)
    log_prob = log_prob + target - z
    clip = {"clip_ratio_low": 0.01, "clip_ratio_high": 0.01}
    _, ours, _ = run(
        "sspo", sspo("erf", "log", 100.0, 100.0, "forward", "sequence"), log_prob, old_log_prob, advantages, mask
    )
    _, theirs, _ = run("gspo", actor_config(**clip), log_prob, old_log_prob, advantages, mask)
    inside, forward = target.abs() < 0.01, advantages[:, :1] * target > 0
    kept, dropped = (inside.expand_as(mask) & mask), ((~inside & forward).expand_as(mask) & mask)
    torch.testing.assert_close(ours[kept], theirs[kept], rtol=1e-4, atol=1e-12)
    assert theirs[dropped].abs().max() == 0
    assert ours[dropped].abs().max() < 1e-12
    # Both pull back what drifted against its advantage: GSPO by the unbounded ratio, the gate by its weight.
    back = (~inside & ~forward).expand_as(mask) & mask
    weight = torch.exp(torch.sign(target) * math.sqrt(math.pi / 2) / 100 - target).expand_as(mask)
    torch.testing.assert_close(ours[back], (theirs * weight)[back], rtol=1e-4, atol=1e-12)


def test_rollout_weights_agree_with_geo_mean_where_nothing_is_gated():
    arguments = batch()
    weights = torch.rand(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.5
    loss, gradient, _ = run("sspo", sspo("arctan", "log", 1e-4, 1e-4), *arguments, rollout_is_weights=weights)
    expected = run("geo_mean", actor_config(**NEVER_BINDS), *arguments, rollout_is_weights=weights)
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-6, atol=1e-9)


def test_where_verls_geo_mean_overflows_sspo_does_not():
    """A log-ratio of 200 in a short response: the reason for a bounded gate."""
    old_log_prob, advantages, mask = torch.zeros(1, 2), torch.full((1, 2), -1.0), torch.ones(1, 2, dtype=torch.bool)
    log_prob = torch.full((1, 2), 200.0)
    theirs = run("geo_mean", actor_config(**NEVER_BINDS), log_prob, old_log_prob, advantages, mask)
    loss, gradient, _ = run("sspo", sspo(), log_prob, old_log_prob, advantages, mask)
    assert not torch.isfinite(theirs[0])
    assert loss.item() == pytest.approx(math.exp(math.atan(12 * 200) / 12))
    assert gradient.abs().max() < 1e-6


def test_verls_own_policy_loss_config_gives_the_preset_v3():
    arguments = batch()
    plain = run("sspo", actor_config(PolicyLossConfig(loss_mode="sspo")), *arguments)
    torch.testing.assert_close(plain[:2], run("sspo", sspo(), *arguments)[:2])


def test_global_batch_info_of_the_actor_is_used():
    arguments = batch()
    config = sspo()
    local = run("sspo", config, *arguments)
    config.global_batch_info.update(dp_size=2, batch_num_tokens=100, global_batch_size=20, loss_scale_factor=None)
    spread = run("sspo", config, *arguments)
    torch.testing.assert_close(spread[0], local[0] * 5 * 2 / 20)
    torch.testing.assert_close(spread[1], local[1] * 5 * 2 / 20)


def test_effective_settings_are_printed_once(capsys, monkeypatch):
    monkeypatch.setattr("verl_sspo.algorithm.registration._announced", False)
    for _ in range(2):
        run("sspo", sspo("erf", tau_pos=3.0, tau_neg=4.0), *batch())
    printed = capsys.readouterr().out
    assert printed.count("gate         erf") == 1
    assert "3 where A > 0" in printed


def test_without_config_the_error_says_so():
    with pytest.raises(ValueError, match="config"):
        get_policy_loss_fn("sspo")(*batch()[:4])
