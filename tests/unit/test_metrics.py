"""The diagnostics, compared with values computed by hand. test_conformance.py tests their reduction by verl."""

import math
import re
from pathlib import Path

import pytest
import torch

from verl_sspo.algorithm.gates import Gate
from verl_sspo.algorithm.loss import sspo_loss

TAU = Gate("arctan", "log", 2.0, 4.0)
INPUTS = ("log_prob", "old_log_prob", "advantages", "rollout_is_weights")
DOCUMENT = Path(__file__).parents[2] / "docs" / "diagnostics.md"


def diagnostics(z, advantages, mask=None, gate=TAU, **options):
    """One number per response under each key."""
    z = torch.tensor(z, dtype=torch.float64)
    mask = torch.ones_like(z, dtype=torch.bool) if mask is None else torch.tensor(mask)
    advantages = torch.tensor(advantages, dtype=torch.float64).reshape(-1, 1).expand_as(z)
    return sspo_loss(z, torch.zeros_like(z), advantages, mask, gate, **options)[1].as_metrics()


def means(*arguments, **options):
    return {name: sum(values) / len(values) for name, values in diagnostics(*arguments, **options).items()}


def slope(u):
    return 1 / (1 + u * u)


def test_by_hand():
    got = means(
        [[0.5, -0.25, 9.0], [0.25, -3.0, 0.05], [7.0, 7.0, 7.0]],
        [2.0, -1.0, 1.0],
        [[True, True, False], [True, True, True], [False, False, False]],
    )
    positive = [slope(1.0), slope(0.5)]  # forward: 0.5; corrective: -0.25
    negative = [slope(1.0), slope(12.0), slope(0.2)]  # forward: -3; corrective: 0.25 and 0.05
    log_weights = [
        (math.atan(1.0) - math.atan(0.5)) / 2 / 2,
        (math.atan(1.0) - math.atan(12.0) + math.atan(0.2)) / 4 / 3,
    ]
    assert got == pytest.approx(
        {
            "actor/ppo_kl": -(0.5 - 0.25 + 0.25 - 3.0 + 0.05) / 5,
            "sspo/slope": (sum(positive) + sum(negative)) / 5,
            "sspo/lost_forward": (2 - positive[0] - negative[1]) / 5,
            "sspo/lost_corrective": (3 - positive[1] - negative[0] - negative[2]) / 5,
            "sspo/lost_positive": (2 - sum(positive)) / 5,
            "sspo/lost_negative": (3 - sum(negative)) / 5,
            "sspo/moved_forward": 2 / 5,
            "sspo/moved_corrective": 2 / 5,
            "sspo/abs_log_ratio": (0.5 + 0.25 + 0.25 + 3.0 + 0.05) / 5,
            "sspo/far_off": 1 / 5,
            "sspo/sequence_weight": (2 * math.exp(log_weights[0]) + 3 * math.exp(log_weights[1])) / 5,
            "sspo/abs_log_weight": (2 * abs(log_weights[0]) + 3 * abs(log_weights[1])) / 5,
            "sspo/tokens_left_out": 0,
            "sspo/responses_left_out": 0,
            "sspo/nonfinite": 0,
        }
    )


def test_tokens_of_rollout_weight_zero_are_left_out_and_counted():
    weights = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    got = means([[0.5, 8.0, -0.5], [9.0, 9.0, 9.0]], [1.0, 1.0], rollout_is_weights=weights, batch_num_tokens=6)
    assert got["sspo/tokens_left_out"] == pytest.approx(4 / 6)
    assert got["sspo/responses_left_out"] == 1 / 2
    # The parts of the six tokens' gradient: passed, lost to the gates, left out.
    assert got["sspo/slope"] == pytest.approx(2 * slope(1.0) / 6)
    lost = got["sspo/lost_forward"] + got["sspo/lost_corrective"]
    assert got["sspo/slope"] + lost + got["sspo/tokens_left_out"] == pytest.approx(1)
    assert got["sspo/far_off"] == 0
    assert got["sspo/sequence_weight"] == pytest.approx(2 / 6)


def test_a_response_without_tokens_adds_nothing():
    """A response without tokens is not averaged in as 0 or 1."""
    one = means([[0.5, -0.25]], [1.0])
    two = means([[0.5, -0.25], [4.0, 4.0]], [1.0, -1.0], [[True, True], [False, False]])
    assert two == pytest.approx(one)


def test_forward_gate_reports_the_slopes_that_act():
    got = means([[0.5, -0.5]], [1.0], gate=Gate("arctan", "log", 2.0, 4.0, "forward"))
    assert got["sspo/lost_forward"] == pytest.approx(0.5 / 2)
    assert got["sspo/lost_corrective"] == 0
    assert got["sspo/slope"] == pytest.approx(0.75)


def test_sapos_gate_is_reported_relative_to_on_policy():
    got = means([[0.0, 0.0], [0.0, 0.0]], [1.0, -1.0], gate=Gate("sigmoid", "ratio", 1.0, 1.05))
    assert got["sspo/slope"] == pytest.approx(1)
    assert got["sspo/sequence_weight"] == pytest.approx(1)
    assert got["sspo/abs_log_weight"] == pytest.approx(0, abs=1e-12)


def test_responses_with_nonfinite_numbers_are_left_out_and_their_tokens_counted():
    got = means([[0.5, math.nan], [0.5, math.inf], [0.5, 0.5]], [1.0, 1.0, 1.0])
    assert got["sspo/nonfinite"] == pytest.approx(2 / 6)
    assert got["sspo/slope"] == pytest.approx(2 * 0.5 / 6)
    assert got["sspo/abs_log_ratio"] == pytest.approx(1 / 6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", INPUTS)
def test_each_input_that_is_not_finite_is_counted_where_it_is_valid(name, bad):
    inputs = {key: torch.full((2, 3), 0.5) for key in INPUTS}
    inputs[name][0, 1] = inputs[name][1, 2] = bad
    mask = torch.tensor([[True, True, True], [True, True, False]])
    loss, found = sspo_loss(response_mask=mask, gate=TAU, **inputs)
    got = found.as_metrics()
    assert all(math.isfinite(value) for values in got.values() for value in values)
    assert got["sspo/nonfinite"] == pytest.approx([2 / 5, 0.0])  # 1 of 5 tokens, times 2 responses
    # An infinite log-ratio saturates its gate. No other non-finite value is trained on.
    assert loss.isfinite() == (name.endswith("log_prob") and not math.isnan(bad))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (3, 4)])
def test_keys_are_the_same_and_finite_without_a_valid_token(shape):
    z = torch.zeros(shape)
    got = sspo_loss(z, z, z, torch.zeros(shape, dtype=torch.bool), TAU)[1].as_metrics()
    assert got.keys() == diagnostics([[0.5]], [1.0]).keys()
    assert all(values == [0.0] * shape[0] for values in got.values())


def test_every_diagnostic_is_in_the_document():
    documented = re.findall(r"^\| `actor/([\w/]+)`", DOCUMENT.read_text(), flags=re.MULTILINE)
    logged = [name.removeprefix("actor/") for name in diagnostics([[0.5]], [1.0])]
    assert sorted(documented) == sorted(logged)


def test_names_do_not_change_verls_reduction():
    """verl takes minima, maxima and sums by what is in a name. Of these it takes the mean."""
    # Not at the top: the import makes verl choose its platform.
    from verl.trainer.ppo.v1.utils import MetricsAggregator
    from verl.utils.metric import reduce_metrics

    names = [f"actor/{name.removeprefix('actor/')}" for name in diagnostics([[0.5]], [1.0])]
    means = dict.fromkeys(names, 2.0)
    assert reduce_metrics({name: [1.0, 3.0] for name in names}) == means
    aggregator = MetricsAggregator()
    for value in (1.0, 3.0):
        aggregator.add_step_metrics(dict.fromkeys(names, value), 1)
    assert aggregator.get_aggregated_metrics() == means
