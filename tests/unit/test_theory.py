"""The toy problems against finite differences, and what must hold of every objective on them."""

import math

import pytest
import torch

from verl_sspo.analysis import objectives, theory, trust_region


@pytest.fixture(scope="module")
def compared():
    names = {"GRPO": "grpo", "GSPO": "gspo", "GMPO": "gmpo", "SAPO": "sapo", "SSPO": "sspo", "forward": "sspo_forward"}
    return {title: objectives.objective(title, [f"algo={name}"]) for title, name in names.items()}


@pytest.fixture
def toy():
    return theory.Toy.draw(3, 3, torch.Generator().manual_seed(3))


def logits_of(toy, seed):
    return torch.randn(*toy.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_toy_enumerates_all_sequences_of_a_policy(toy):
    assert toy.sequences.shape == (27, 3)
    assert toy.shape == (1 + 3 + 9, 3)
    assert toy.log_prob(logits_of(toy, 0)).sum(-1).exp().sum() == pytest.approx(1.0)
    assert toy.rewards.sum() == 9


def test_the_exact_gradient_is_the_derivative_of_the_expected_advantage(toy):
    logits, advantages = logits_of(toy, 0).requires_grad_(), toy.advantages(logits_of(toy, 1))
    expected = (toy.log_prob(logits).sum(-1).exp() * advantages).sum()
    (gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(toy.exact_gradient(logits.detach(), advantages), gradient.flatten())


def test_advantages_have_mean_0_and_deviation_1_under_the_old_policy(toy):
    old = logits_of(toy, 1)
    weight, advantages = toy.log_prob(old).sum(-1).exp(), toy.advantages(old)
    assert (weight * advantages).sum() == pytest.approx(0.0, abs=1e-12)
    assert (weight * advantages**2).sum() == pytest.approx(1.0)


def test_exact_importance_weights_have_no_bias_at_any_drift(toy):
    old, logits = logits_of(toy, 1), logits_of(toy, 2)
    advantages = toy.advantages(old)
    weight = toy.log_prob(old).sum(-1).exp()
    mean = (weight[:, None] * toy.estimates(None, logits, old, advantages)).sum(0)
    torch.testing.assert_close(mean, toy.exact_gradient(logits, advantages))


def test_on_policy_every_objective_has_the_exact_gradient_and_one_variance(compared):
    table = theory.bias_and_variance(compared, drifts=(0.0,), draws=2)
    assert (table["bias"] < 1e-6).all()
    assert (table["cosine"] > 1 - 1e-9).all()
    per_direction = table.groupby("direction")["variance"]
    assert ((per_direction.max() - per_direction.min()) / per_direction.mean() < 1e-5).all()


def test_the_drift_is_what_was_asked_for(toy):
    old, direction = logits_of(toy, 1), logits_of(toy, 2)
    step = theory._step(toy, old, direction, 0.2)
    z = toy.log_prob(old + step * direction) - toy.log_prob(old)
    assert (toy.log_prob(old).sum(-1).exp() * z.abs().mean(-1)).sum() == pytest.approx(0.2)


def test_trust_regions_by_hand(compared):
    z = torch.tensor([-0.5, 0.0, 0.1, 0.5], dtype=torch.float64)

    def of(title, advantage, together=False):
        return trust_region.coefficients(compared[title], z, advantage, together).tolist()

    e = [math.exp(x) for x in z.tolist()]
    # PPO's min: full gradient inside of 1.2, none above; below it the ratio itself.
    assert of("GRPO", 1.0) == pytest.approx([e[0], 1, e[2], 0], abs=1e-9)
    assert of("GRPO", -1.0) == pytest.approx([0, 1, e[2], e[3]], abs=1e-9)
    # S times the slope 1 / (1 + tau^2 z^2).
    slope = [1 / (1 + 100 * x**2) for x in z.tolist()]
    weight = [math.exp(math.atan(10 * x) / 10 / 32) for x in z.tolist()]
    assert of("SSPO", 1.0) == pytest.approx([s * w for s, w in zip(slope, weight, strict=True)], rel=1e-9)
    # The token that drifted against its advantage keeps slope 1.
    assert of("forward", 1.0)[0] == pytest.approx(weight[0], rel=1e-9)
    assert of("forward", 1.0)[3] == pytest.approx(slope[3] * weight[3], rel=1e-9)
    assert of("GMPO", 1.0, together=True) == pytest.approx([e[0], 1, e[2], 0], abs=1e-6)
    # SAPO: f'(r) r.
    sapo = [x / math.cosh((x - 1) / 2) ** 2 for x in e]
    assert of("SAPO", 1.0) == pytest.approx(sapo, rel=1e-9)


def test_limits_are_reached(compared):
    clip = "actor_rollout_ref.actor.clip_ratio"
    unclipped = objectives.objective("GSPO", ["algo=gspo", *(f"{clip}{end}=1.0e9" for end in ("", "_low", "_high"))])

    def with_gate(shape, tau):
        return objectives.with_policy_loss(compared["SSPO"], gate=shape, tau_pos=tau, tau_neg=tau)

    v1 = objectives.objective("SSPO v1", ["algo=sspo_v1"])
    others = {title: compared[title] for title in ("GRPO", "SAPO")}
    limits = theory.limits({"SSPO": compared["SSPO"], "SSPO v1": v1}, others, unclipped, with_gate)
    for distances in limits.to_unclipped.values():
        assert distances[0] < 1e-6
        assert distances == sorted(distances)
    for distances in limits.to_policy_gradient.values():
        assert distances[0] < 1e-5
    torch.testing.assert_close(limits.weights["SSPO v1"], limits.weights["SAPO"])
    assert max(limits.weights["SSPO"]) < limits.bound
    assert min(limits.weights["SSPO"]) > 1 / limits.bound
