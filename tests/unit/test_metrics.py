import math
import re

import pytest
import torch

import verl_sspo.algorithm.metrics
from verl_sspo.algorithm.gates import Gate
from verl_sspo.algorithm.loss import sspo_loss

TAU = Gate("arctan", "log", 2.0, 4.0)


def metrics(z, advantages, mask=None, gate=TAU):
    z = torch.tensor(z, dtype=torch.float64)
    mask = torch.ones_like(z, dtype=torch.bool) if mask is None else torch.tensor(mask)
    advantages = torch.tensor(advantages, dtype=torch.float64).reshape(-1, 1).expand_as(z)
    return sspo_loss(z, torch.zeros_like(z), advantages, mask, gate)[1].as_metrics()


def test_by_hand():
    got = metrics(
        [[0.5, -0.25, 9.0], [0.25, -3.0, 0.05], [7.0, 7.0, 7.0]],
        [2.0, -1.0, 1.0],
        [[True, True, False], [True, True, True], [False, False, False]],
    )

    def slope(u):
        return 1 / (1 + u * u)

    positive = [slope(1.0), slope(0.5)]
    negative = [slope(1.0), slope(12.0), slope(0.2)]  # forward: -3; corrective: 0.25
    weights = [
        math.exp((math.atan(1.0) - math.atan(0.5)) / 2 / 2),
        math.exp((math.atan(1.0) - math.atan(12.0) + math.atan(0.2)) / 4 / 3),
    ]
    mean = sum(weights) / 2
    expected = {
        "actor/ppo_kl": -(0.5 - 0.25 + 0.25 - 3.0 + 0.05) / 5,
        "sspo/slope": (sum(positive) + sum(negative)) / 5,
        "sspo/slope_positive": sum(positive) / 2,
        "sspo/slope_negative": sum(negative) / 3,
        "sspo/slope_forward": (slope(1.0) + slope(12.0)) / 2,
        "sspo/slope_corrective": (slope(0.5) + slope(1.0)) / 2,
        "sspo/share_forward": 2 / 5,
        "sspo/share_corrective": 2 / 5,
        "sspo/closed_positive": 0.0,
        "sspo/closed_negative": 1 / 3,
        "sspo/sequence_weight": mean,
        "sspo/sequence_weight_std": abs(weights[0] - weights[1]) / 2,
        "sspo/sequence_weight_min": min(weights),
        "sspo/sequence_weight_max": max(weights),
        "sspo/effective_sample_size": sum(weights) ** 2 / (2 * sum(w * w for w in weights)),
        "sspo/abs_log_ratio": (0.5 + 0.25 + 0.25 + 3.0 + 0.05) / 5,
        "sspo/abs_log_ratio_max": 3.0,
        "sspo/tokens": 5,
        "sspo/sequences": 2,
        "sspo/nonfinite_log_prob": 0,
        "sspo/nonfinite_old_log_prob": 0,
        "sspo/nonfinite_advantages": 0,
        "sspo/nonfinite_rollout_is_weights": 0,
    }
    assert got == pytest.approx(expected)


def test_forward_gate_reports_the_slopes_that_act():
    got = metrics([[0.5, -0.5]], [1.0], gate=Gate("arctan", "log", 2.0, 4.0, "forward"))
    assert got["sspo/slope_forward"] == pytest.approx(0.5)
    assert got["sspo/slope_corrective"] == 1


def test_sapos_gate_is_reported_relative_to_on_policy():
    got = metrics([[0.0, 0.0], [0.0, 0.0]], [1.0, -1.0], gate=Gate("sigmoid", "ratio", 1.0, 1.05))
    assert got["sspo/slope"] == pytest.approx(1)
    assert got["sspo/sequence_weight_min"] == pytest.approx(1)
    assert got["sspo/sequence_weight_max"] == pytest.approx(1)
    assert got["sspo/effective_sample_size"] == pytest.approx(1)


def test_nonfinite_log_ratios_are_counted_and_left_out():
    got = metrics([[0.5, math.nan], [0.5, math.inf], [-math.inf, 0.5]], [1.0, 1.0, 1.0])
    assert all(map(math.isfinite, got.values()))
    assert got["sspo/nonfinite_log_prob"] == 3
    assert got["sspo/nonfinite_old_log_prob"] == got["sspo/nonfinite_advantages"] == 0
    assert got["sspo/tokens"] == 6
    assert got["sspo/slope"] == pytest.approx(0.5)
    assert got["sspo/abs_log_ratio_max"] == 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", verl_sspo.algorithm.metrics.INPUTS)
def test_each_input_that_is_not_finite_is_counted_where_it_is_valid(name, bad):
    inputs = {key: torch.full((2, 3), 0.5) for key in verl_sspo.algorithm.metrics.INPUTS}
    inputs[name][0, 1] = inputs[name][1, 2] = bad
    mask = torch.tensor([[True, True, True], [True, True, False]])
    loss, statistics = sspo_loss(response_mask=mask, gate=TAU, **inputs)
    got = statistics.as_metrics()
    assert all(map(math.isfinite, got.values()))
    counts = {key: got[f"sspo/nonfinite_{key}"] for key in verl_sspo.algorithm.metrics.INPUTS}
    assert counts == {key: float(key == name) for key in verl_sspo.algorithm.metrics.INPUTS}
    # An infinite log-ratio saturates its gate; nothing else is trained on.
    assert loss.isfinite() == (name.endswith("log_prob") and not math.isnan(bad))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (3, 4)])
def test_keys_are_the_same_and_finite_without_a_valid_token(shape):
    z = torch.zeros(shape)
    got = sspo_loss(z, z, z, torch.zeros(shape, dtype=torch.bool), TAU)[1].as_metrics()
    assert got.keys() == metrics([[0.5]], [1.0]).keys()
    assert all(map(math.isfinite, got.values()))
    assert got["sspo/slope"] == got["sspo/sequence_weight"] == 1


def test_every_metric_is_defined_in_the_table_of_the_module():
    documented = re.findall(r"`((?:sspo|actor)/\w+)`", verl_sspo.algorithm.metrics.__doc__.split("|---|---|")[1])
    assert sorted(documented) == sorted(metrics([[0.5]], [1.0]))


def test_names_do_not_trick_verls_reduction():
    """verl reduces a name with "min" or "max" in it by the smallest or largest: only those meant may have it."""
    tricky = [key for key in metrics([[0.5]], [1.0]) if "min" in key or "max" in key]
    assert tricky == ["sspo/sequence_weight_min", "sspo/sequence_weight_max", "sspo/abs_log_ratio_max"]


def test_metrics_cross_to_the_host_once(monkeypatch):
    crossings = []
    for name in ("cpu", "numpy", "item", "tolist", "__bool__", "__float__", "__int__", "__index__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, o=original, n=name: (crossings.append(n), o(self, *a))[1]
        )
    metrics([[0.5, -0.5]], [1.0])
    assert crossings == ["tolist"]
