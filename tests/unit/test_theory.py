"""The toy problems, compared with finite differences, and what must hold for every objective on them."""

import math

import pytest
import torch

from verl_sspo.analysis import theory
from verl_sspo.analysis.objectives import actor_config


@pytest.fixture(scope="module")
def compared():
    names = {"GRPO": "grpo", "GMPO": "gmpo", "SAPO": "sapo", "SSPO": "sspo", "forward": "sspo_forward"}
    return {title: actor_config([f"algo={name}"]) for title, name in {**names, "SSPO v1": "sspo_v1"}.items()}


@pytest.fixture
def toy():
    return theory.Toy.draw(3, 3, torch.Generator().manual_seed(3))


def logits_of(toy, seed):
    return torch.randn(13, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_toy_enumerates_all_sequences_of_a_policy(toy):
    assert toy.sequences.shape == (27, 3)
    assert toy.states.unique().tolist() == list(range(1 + 3 + 9))
    assert toy.log_prob(logits_of(toy, 0)).sum(-1).exp().sum() == pytest.approx(1.0)
    assert toy.rewards.sum() == 9


def test_the_exact_gradient_is_the_derivative_of_the_expected_advantage(toy):
    logits, advantages = logits_of(toy, 0), toy.advantages(logits_of(toy, 1))
    gradient = toy.exact_gradient(logits, advantages)
    for state, token in ((0, 0), (2, 1), (12, 2)):
        shift = torch.zeros_like(logits)
        shift[state, token] = 1e-6
        up, down = ((toy.probability(logits + sign * shift) * advantages).sum() for sign in (1, -1))
        assert gradient[state, token] == pytest.approx(float(up - down) / 2e-6, rel=1e-6, abs=1e-9)


def test_advantages_have_mean_0_and_deviation_1_under_the_old_policy(toy):
    old = logits_of(toy, 1)
    weight, advantages = toy.log_prob(old).sum(-1).exp(), toy.advantages(old)
    assert (weight * advantages).sum() == pytest.approx(0.0, abs=1e-12)
    assert (weight * advantages**2).sum() == pytest.approx(1.0)


def test_exact_importance_weights_have_no_bias_at_any_drift(toy):
    old, logits = logits_of(toy, 1), logits_of(toy, 2)
    advantages = toy.advantages(old)
    weight = toy.log_prob(old).sum(-1).exp()
    mean = (weight[:, None, None] * toy.estimates(None, logits, old, advantages)).sum(0)
    torch.testing.assert_close(mean, toy.exact_gradient(logits, advantages))


def test_on_policy_every_objective_has_the_exact_gradient_and_one_variance(compared):
    table = theory.bias_and_variance(compared, drifts=(0.0,), draws=2)
    assert (table["bias"] < 1e-6).all()
    assert (table["cosine"] > 1 - 1e-9).all()
    per_direction = table.groupby("direction")["variance"]
    assert ((per_direction.max() - per_direction.min()) / per_direction.mean() < 1e-5).all()


def test_the_drift_is_what_was_asked_for(toy):
    old, direction = logits_of(toy, 1), logits_of(toy, 2)
    step = theory.step_for(toy, old, direction, 0.2)
    z = toy.log_prob(old + step * direction) - toy.log_prob(old)
    assert (toy.log_prob(old).sum(-1).exp() * z.abs().mean(-1)).sum() == pytest.approx(0.2)


def test_trust_regions_by_hand(compared):
    z = torch.tensor([-0.5, 0.0, 0.1, 0.5], dtype=torch.float64)

    def of(title, advantage, together=False):
        return theory.token_coefficients(compared[title], z, advantage, together).tolist()

    e = [math.exp(x) for x in z.tolist()]
    # PPO's min: the coefficient is the ratio, and 0 where the clip acts (above 1.2 for A > 0).
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
    limits = theory.limits(compared)
    for _, distances in limits["temperature"].items():
        assert distances.iloc[0] < 1e-6
        assert distances.is_monotonic_increasing
    assert (limits["drift"].iloc[0] < 1e-5).all()
    weights = limits["log-ratio"]
    assert weights["SSPO v1"].to_numpy() == pytest.approx(weights["SAPO"].to_numpy())
    bound = math.exp(math.pi / (2 * 10.0))
    assert weights["SSPO"].between(1 / bound, bound).all()


def test_the_loss_does_not_announce_itself_where_nothing_trains(compared, capsys, monkeypatch):
    from verl_sspo.algorithm import registration

    monkeypatch.setattr(registration, "_announced", False)
    theory.token_coefficients(compared["SSPO"], torch.zeros(1, dtype=torch.float64), 1.0, together=False)
    assert capsys.readouterr().out == ""
