"""The loss and its closed-form gradient, compared with values computed by hand and with the plain formula."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from verl.trainer.ppo.core_algos import agg_loss

from verl_sspo.algorithm.gates import DOMAINS, LEVELS, SHAPES, SIDES, Gate
from verl_sspo.algorithm.loss import sequence_coefficients, sspo_loss
from verl_sspo.algorithm.reference import LOG_GATES, sspo_loss_matrix

GATES = [
    Gate(shape, domain, 1.3, 2.1, side, level)
    for shape in SHAPES
    for domain in DOMAINS
    for side in SIDES
    for level in LEVELS
    if (shape, domain, side) != ("sigmoid", "ratio", "forward")
]
AGG_MODES = ["seq-mean-token-mean", "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm"]


def batch(seed: int, rows: int = 6, length: int = 9, dtype=torch.float64, scale: float = 1.0, tokenwise: bool = False):
    """Ragged rows, the third one without a valid token."""
    generator = torch.Generator().manual_seed(seed)
    old_log_prob = -torch.rand(rows, length, generator=generator, dtype=dtype)
    log_prob = old_log_prob + scale * torch.randn(rows, length, generator=generator, dtype=dtype)
    advantages = torch.randn(rows, length if tokenwise else 1, generator=generator, dtype=dtype).expand(rows, length)
    mask = torch.rand(rows, length, generator=generator) < 0.7
    if rows > 2:
        mask[2] = False
    return log_prob, old_log_prob, advantages, mask


def value_and_gradient(log_prob, old_log_prob, advantages, mask, gate, **options):
    leaf = log_prob.clone().requires_grad_()
    loss, _ = sspo_loss(leaf, old_log_prob, advantages, mask, gate, **options)
    loss.backward()
    return loss.detach(), leaf.grad


def test_by_hand():
    # One response of two tokens, tau z = (1, 0): S = exp((pi / 4 / 2 + 0) / 2) = exp(pi / 16).
    gate = Gate("arctan", "log", 2.0, 3.0)
    log_prob = torch.tensor([[0.5, 0.0]], dtype=torch.float64)
    loss, gradient = value_and_gradient(
        log_prob, torch.zeros(1, 2, dtype=torch.float64), torch.full((1, 2), 4.0), torch.ones(1, 2), gate
    )
    weight = math.exp(math.pi / 16)
    assert loss.item() == pytest.approx(-4 * weight)
    torch.testing.assert_close(gradient, torch.tensor([[-4 * weight * 0.5 / 2, -4 * weight / 2]], dtype=torch.float64))


def test_negative_advantage_takes_the_other_temperature():
    gate = Gate("arctan", "log", 2.0, 3.0)
    loss, gradient = value_and_gradient(
        torch.full((1, 1), 0.5), torch.zeros(1, 1), torch.full((1, 1), -1.0), torch.ones(1, 1), gate
    )
    assert loss.item() == pytest.approx(math.exp(math.atan(1.5) / 3))
    assert gradient.item() == pytest.approx(math.exp(math.atan(1.5) / 3) / (1 + 1.5**2))


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("mode", AGG_MODES)
@pytest.mark.parametrize("tokenwise", [False, True])
def test_equals_the_plain_formula_through_verls_aggregation(gate, mode, tokenwise):
    log_prob, old_log_prob, advantages, mask = batch(1, tokenwise=tokenwise)
    rollout_is_weights = torch.rand(log_prob.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 2
    info = {"dp_size": 2, "batch_num_tokens": 61, "global_batch_size": 14, "loss_scale_factor": None}
    loss, gradient = value_and_gradient(
        log_prob,
        old_log_prob,
        advantages,
        mask,
        gate,
        loss_agg_mode=mode,
        rollout_is_weights=rollout_is_weights,
        **info,
    )
    leaf = log_prob.clone().requires_grad_()
    plain = agg_loss(
        sspo_loss_matrix(leaf, old_log_prob, advantages, mask, gate, rollout_is_weights), mask, mode, **info
    )
    plain.backward()
    # verl divides by n + 1e-8.
    torch.testing.assert_close(loss, plain.detach(), rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("gate", [gate for gate in GATES if gate.side == "both"], ids=str)
def test_is_minus_the_mean_of_advantage_times_sequence_weight(gate):
    """The objective as in the paper, response by response, with the gradient through S_i."""
    log_prob, old_log_prob, advantages, mask = batch(3)
    leaf = log_prob.clone().requires_grad_()
    terms = []
    for row in torch.nonzero(mask.any(dim=-1)).flatten():
        advantage = advantages[row, 0]
        tau = torch.tensor(gate.tau_pos if advantage > 0 else gate.tau_neg, dtype=torch.float64)
        z = (leaf - old_log_prob)[row][mask[row]]
        log_f = LOG_GATES[gate.shape, gate.domain](z.mean() if gate.level == "sequence" else z, tau)
        terms.append(advantage * log_f.mean().exp())
    objective = torch.stack(terms).mean()
    objective.backward()
    loss, gradient = value_and_gradient(log_prob, old_log_prob, advantages, mask, gate)
    torch.testing.assert_close(loss, -objective.detach())
    torch.testing.assert_close(gradient, -leaf.grad)


@pytest.mark.parametrize("gate", [gate for gate in GATES if gate.side == "both"], ids=str)
def test_gradcheck(gate):
    log_prob, old_log_prob, advantages, mask = batch(4, rows=4, length=5)
    assert torch.autograd.gradcheck(
        lambda x: sspo_loss(x, old_log_prob, advantages, mask, gate)[0], (log_prob.requires_grad_(),)
    )


def test_forward_gate_opens_the_slope_of_tokens_that_moved_against_their_advantage():
    """Values are those of the two-sided gate; slopes are kappa where sgn(A) z > 0 and 1 elsewhere."""
    both, forward = Gate("arctan", "log", 2.0, 3.0), Gate("arctan", "log", 2.0, 3.0, "forward")
    z = torch.tensor([[0.5, -0.5, 0.0], [0.5, -0.5, 0.0]], dtype=torch.float64)
    advantages = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).expand(2, 3)
    arguments = (z, torch.zeros_like(z), advantages, torch.ones_like(z))
    loss_both, gradient_both = value_and_gradient(*arguments, both)
    loss_forward, gradient_forward = value_and_gradient(*arguments, forward)
    assert loss_forward == loss_both
    slopes = torch.tensor([[0.5, 1.0, 1.0], [1.0, 1 / (1 + 1.5**2), 1.0]], dtype=torch.float64)
    torch.testing.assert_close(gradient_forward[:, :2] / gradient_forward[:, 2:], slopes[:, :2])
    assert (gradient_both[:, 2] == gradient_forward[:, 2]).all()


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("garbage", [0.0, math.nan, math.inf, -math.inf])
def test_masked_positions_change_nothing(gate, garbage):
    log_prob, old_log_prob, advantages, mask = batch(5)
    weights = torch.ones_like(log_prob)
    clean = value_and_gradient(log_prob, old_log_prob, advantages, mask, gate, rollout_is_weights=weights)
    dirty = [torch.where(mask, t, garbage) for t in (log_prob, old_log_prob, advantages)]
    loss, gradient = value_and_gradient(*dirty, mask, gate, rollout_is_weights=torch.where(mask, weights, garbage))
    assert loss == clean[0]
    assert (gradient == clean[1]).all()
    assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("mode", AGG_MODES)
def test_a_batch_without_valid_tokens_is_zero_and_has_a_graph(mode):
    log_prob, old_log_prob, advantages, mask = batch(6)
    loss, gradient = value_and_gradient(
        log_prob, old_log_prob, advantages, torch.zeros_like(mask), Gate(), loss_agg_mode=mode
    )
    assert loss == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("extreme", [math.inf, -math.inf, 1e30, -1e30, 200.0, -200.0])
def test_extreme_log_ratios_saturate(gate, dtype, extreme):
    log_prob, old_log_prob, advantages, mask = batch(7, dtype=dtype)
    mask[0, 0] = True
    log_prob[0, 0], old_log_prob[0, 0] = (extreme, 0.0) if extreme > 0 else (0.0, -extreme)
    loss, gradient = value_and_gradient(log_prob, old_log_prob, advantages, mask, gate)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    if gate.side == "both":
        # At sequence level the mean of the response is less extreme.
        assert gradient[0, 0].abs() < (1e-4 if gate.level == "token" else 1e-3)


def test_log_domain_weight_stays_within_its_bound():
    tau = 2.0
    bound = math.exp(math.pi / (2 * tau))
    z = torch.tensor([[math.inf] * 3, [-math.inf] * 3, [50.0] * 3])
    _, diagnostics = sspo_loss(
        z, torch.zeros(3, 3), torch.ones(3, 3), torch.ones(3, 3), Gate("arctan", "log", tau, tau)
    )
    weights = diagnostics.log_weights.exp()
    torch.testing.assert_close(weights[:2], torch.tensor([bound, 1 / bound]))
    assert weights[2] < bound


@pytest.mark.parametrize("place", ["log_prob", "old_log_prob", "advantages"])
def test_nan_at_a_valid_token_is_never_hidden(place):
    tensors = dict(zip(("log_prob", "old_log_prob", "advantages"), batch(8)[:3], strict=True))
    mask = batch(8)[3]
    row, column = torch.nonzero(mask)[0]
    tensors[place] = tensors[place].clone()
    tensors[place][row, column] = math.nan
    loss, _ = value_and_gradient(*tensors.values(), mask, Gate())
    assert loss.isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_input_is_computed_in_float32(dtype):
    log_prob, old_log_prob, advantages, mask = (
        t.to(dtype) if t.is_floating_point() else t for t in batch(9, scale=0.3)
    )
    loss, gradient = value_and_gradient(log_prob, old_log_prob, advantages, mask, Gate())
    exact = value_and_gradient(log_prob.double(), old_log_prob.double(), advantages.double(), mask, Gate())
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(loss.double(), exact[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient.double(), exact[1], rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize(("tau_pos", "tau_neg"), [(1e-3, 1e3), (1e3, 1e-3), (1e-4, 1e8)])
def test_temperatures_far_apart_keep_their_precision(tau_pos, tau_neg):
    arguments, gate = batch(18, dtype=torch.float32, scale=0.3), Gate("arctan", "log", tau_pos, tau_neg)
    loss, gradient = value_and_gradient(*arguments, gate)
    exact = value_and_gradient(*(t.double() if t.is_floating_point() else t for t in arguments), gate)
    torch.testing.assert_close(loss.double(), exact[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), exact[1], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", ["log_prob", "old_log_prob", "advantages", "rollout_is_weights"])
def test_one_input_in_float64_makes_the_computation_float64(name):
    names = ("log_prob", "old_log_prob", "advantages")
    inputs = dict(zip(names, batch(10)[:3], strict=True)) | {"rollout_is_weights": torch.full((6, 9), 1.7)}
    inputs = {key: value.float() for key, value in inputs.items()}
    exact = {key: value.double() for key, value in inputs.items()}
    mask = batch(10)[3]
    loss, _ = sspo_loss(response_mask=mask, gate=Gate(), **inputs | {name: exact[name]})
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, sspo_loss(response_mask=mask, gate=Gate(), **exact)[0], rtol=1e-12, atol=0)


def test_rollout_weights_enter_as_one_detached_geometric_mean_per_response():
    log_prob, old_log_prob, advantages, mask = batch(11, rows=1, length=2)
    mask[:] = True
    weights = torch.tensor([[4.0, 1.0]], dtype=torch.float64, requires_grad=True)  # geometric mean 2
    plain = value_and_gradient(log_prob, old_log_prob, advantages, mask, Gate())
    loss, gradient = value_and_gradient(log_prob, old_log_prob, advantages, mask, Gate(), rollout_is_weights=weights)
    torch.testing.assert_close(loss, 2 * plain[0])
    torch.testing.assert_close(gradient, 2 * plain[1])
    assert weights.grad is None


def test_a_rollout_weight_of_zero_leaves_its_token_out_by_hand():
    """The mean of (4, 0, 1) is sqrt(4 x 1) = 2, over two tokens. There tau z = (1, 0), so S = exp(pi / 16)."""
    gate = Gate("arctan", "log", 2.0, 3.0)
    log_prob = torch.tensor([[0.5, -3.0, 0.0]], dtype=torch.float64)
    weights = torch.tensor([[4.0, 0.0, 1.0]])
    loss, gradient = value_and_gradient(
        log_prob, torch.zeros(1, 3), torch.full((1, 3), 4.0), torch.ones(1, 3), gate, rollout_is_weights=weights
    )
    value = 2 * 4 * math.exp(math.pi / 16)
    assert loss.item() == pytest.approx(-value)
    torch.testing.assert_close(gradient, torch.tensor([[-value * 0.5 / 2, 0.0, -value / 2]], dtype=torch.float64))


def test_one_rejected_token_does_not_take_its_response():
    """verl's icepop rejects one token of 1,000: nothing else changes by more than a few thousandths."""
    log_prob, old_log_prob, advantages, mask = batch(19, rows=1, length=1000, scale=0.1)
    mask[:] = True
    weights = torch.ones_like(log_prob)
    whole, gradient = value_and_gradient(log_prob, old_log_prob, advantages, mask, Gate(), rollout_is_weights=weights)
    weights[0, 500] = 0.0
    loss, left = value_and_gradient(log_prob, old_log_prob, advantages, mask, Gate(), rollout_is_weights=weights)
    torch.testing.assert_close(loss, whole, rtol=2e-3, atol=0)
    assert left[0, 500] == 0
    others = torch.arange(1000) != 500
    torch.testing.assert_close(left[0, others], gradient[0, others], rtol=3e-3, atol=0)


@pytest.mark.parametrize("mode", AGG_MODES)
def test_a_response_with_no_weight_left_contributes_nothing(mode):
    log_prob, old_log_prob, advantages, mask = batch(20)
    weights = torch.ones_like(log_prob)
    weights[0] = 0.0
    loss, gradient = value_and_gradient(
        log_prob, old_log_prob, advantages, mask, Gate(), loss_agg_mode=mode, rollout_is_weights=weights
    )
    mask = mask.clone()
    mask[0] = False
    expected = value_and_gradient(log_prob, old_log_prob, advantages, mask, Gate(), loss_agg_mode=mode)
    torch.testing.assert_close((loss, gradient), expected)
    assert (gradient[0] == 0).all()
    loss, gradient = value_and_gradient(
        log_prob, old_log_prob, advantages, mask, Gate(), rollout_is_weights=torch.zeros_like(weights)
    )
    assert loss == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_weight_zero_is_mask_zero_bit_for_bit(gate, dtype, zero):
    log_prob, old_log_prob, advantages, mask = (
        t.to(dtype) if t.is_floating_point() else t for t in batch(21, tokenwise=True)
    )
    generator = torch.Generator().manual_seed(22)
    weights = (torch.rand(mask.shape, generator=generator) + 0.5).to(dtype)
    out = torch.rand(mask.shape, generator=generator) < 0.3
    sizes = {"dp_size": 2, "batch_num_tokens": 61, "global_batch_size": 14}
    # The values at a token that is left out do not matter either.
    dirty = [tensor.masked_fill(out, math.nan) for tensor in (log_prob, old_log_prob, advantages)]
    by_weight = value_and_gradient(*dirty, mask, gate, rollout_is_weights=weights.masked_fill(out, zero), **sizes)
    clean = (log_prob, old_log_prob, advantages, mask & ~out)
    by_mask = value_and_gradient(*clean, gate, rollout_is_weights=weights, **sizes)
    assert torch.equal(by_weight[0], by_mask[0])
    assert torch.equal(by_weight[1], by_mask[1])


@pytest.mark.parametrize("weight", [-1.0, -1e-30, math.nan])
def test_a_negative_or_nan_rollout_weight_makes_the_loss_nan(weight):
    log_prob, old_log_prob, advantages, mask = batch(23)
    weights = torch.ones_like(log_prob)
    weights[tuple(mask.nonzero()[0])] = weight
    loss, _ = value_and_gradient(log_prob, old_log_prob, advantages, mask, Gate(), rollout_is_weights=weights)
    assert loss.isnan()


def test_a_tiny_rollout_weight_in_float64_is_not_zero():
    log_prob, old_log_prob, advantages, mask = batch(24, dtype=torch.float32)
    weights = torch.full(log_prob.shape, 1e-60, dtype=torch.float64)
    plain = value_and_gradient(log_prob, old_log_prob, advantages, mask, Gate())
    loss, _ = value_and_gradient(log_prob, old_log_prob, advantages, mask, Gate(), rollout_is_weights=weights)
    assert loss.item() == pytest.approx(1e-60 * plain[0].item(), rel=1e-4)


@pytest.mark.parametrize("mode", AGG_MODES)
@given(
    seed=st.integers(0, 2**32 - 1),
    splits=st.lists(st.integers(1, 3), min_size=1, max_size=6),
    padding=st.integers(0, 5),
    gate=st.sampled_from(GATES),
)
@settings(deadline=None, max_examples=40)
def test_micro_batches_ranks_padding_and_order_do_not_matter(mode, seed, splits, padding, gate):
    """The sum over micro-batches, averaged over data-parallel ranks, is the loss of the whole mini-batch."""
    rows, dp_size = sum(splits), 2
    log_prob, old_log_prob, advantages, mask = batch(seed, rows=rows)
    info = {
        "batch_num_tokens": int(mask.sum()) or 1,
        "global_batch_size": int(mask.any(dim=-1).sum()) or 1,
        "loss_scale_factor": 7.0,
        "loss_agg_mode": mode,
    }
    weights = torch.rand(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    weights = (weights * 2 - 0.5).clamp(min=0.0)  # a quarter are 0
    whole = value_and_gradient(
        log_prob, old_log_prob, advantages, mask, gate, dp_size=1, rollout_is_weights=weights, **info
    )
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    loss, gradient = torch.zeros((), dtype=torch.float64), torch.zeros_like(log_prob)
    for micro_batch in order.split(splits):
        padded = [
            torch.nn.functional.pad(t[micro_batch], (0, padding), value=value)
            for t, value in (
                (log_prob, math.nan),
                (old_log_prob, 0.0),
                (advantages, 0.0),
                (mask, False),
                (weights, 0.0),
            )
        ]
        *padded, padded_weights = padded
        part = value_and_gradient(*padded, gate, dp_size=dp_size, rollout_is_weights=padded_weights, **info)
        loss += part[0] / dp_size
        gradient[micro_batch] = part[1][:, : log_prob.shape[1]] / dp_size
    torch.testing.assert_close(loss, whole[0])
    torch.testing.assert_close(gradient, whole[1])


def test_blocks_of_rows_do_not_matter(monkeypatch):
    arguments = (*batch(12, rows=7), Gate())
    whole = value_and_gradient(*arguments)
    metrics = sspo_loss(*arguments)[1].as_metrics()
    monkeypatch.setattr("verl_sspo.algorithm.loss._CPU_BLOCK_TOKENS", 20)
    torch.testing.assert_close(value_and_gradient(*arguments), whole)
    for name, values in sspo_loss(*arguments)[1].as_metrics().items():
        assert values == pytest.approx(metrics[name]), name


def test_strides_do_not_matter():
    arguments = batch(13, rows=7)
    transposed = [tensor.T.contiguous().T for tensor in arguments]
    assert not any(tensor.is_contiguous() for tensor in transposed)
    torch.testing.assert_close(value_and_gradient(*transposed, Gate()), value_and_gradient(*arguments, Gate()))


def test_backward_keeps_one_tensor_of_the_batch_and_a_factor_per_row():
    log_prob, old_log_prob, advantages, mask = batch(13, dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        sspo_loss(log_prob.requires_grad_(), old_log_prob, advantages, mask, Gate())[0].backward()
    assert [t.shape for t in saved] == [log_prob.shape, log_prob.shape[:1]]
    assert saved[0].dtype == torch.float32


def test_a_very_long_response_is_exact():
    """100,000 tokens in float32 against float64."""
    arguments = batch(14, rows=1, length=100_000, scale=0.05)
    exact = value_and_gradient(*arguments, Gate())
    rounded = value_and_gradient(*(t.float() if t.is_floating_point() else t for t in arguments), Gate())
    torch.testing.assert_close(rounded[0].double(), exact[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(rounded[1].double(), exact[1], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("mode", AGG_MODES)
def test_coefficients_without_global_sizes_are_verls(mode):
    _, _, advantages, mask = batch(15)
    coefficients = sequence_coefficients(mask.sum(-1), mode, response_length=9, dtype=torch.float64)
    ours = (coefficients.unsqueeze(-1) * advantages * mask).sum()
    torch.testing.assert_close(ours, agg_loss(advantages, mask, mode), rtol=1e-6, atol=0)


def test_bad_input_says_what_is_wrong():
    log_prob, old_log_prob, advantages, mask = batch(16)
    with pytest.raises(ValueError, match="one shape"):
        sspo_loss(log_prob, old_log_prob[:, 1:], advantages, mask, Gate())
    with pytest.raises(ValueError, match="one shape"):
        sspo_loss(log_prob, old_log_prob, advantages, mask, Gate(), rollout_is_weights=torch.ones(6))
    with pytest.raises(ValueError, match="seq-mean-token-mean"):
        sspo_loss(log_prob, old_log_prob, advantages, mask, Gate(), loss_agg_mode="mean")
    with pytest.raises(ValueError, match="global_batch_size"):
        sspo_loss(log_prob, old_log_prob, advantages, mask, Gate(), dp_size=2)
    with pytest.raises(ValueError, match="batch_num_tokens"):
        sspo_loss(log_prob, old_log_prob, advantages, mask, Gate(), dp_size=2, loss_agg_mode="token-mean")


def test_activation_checkpointing_and_gradient_scaling_keep_the_gradient():
    log_prob, old_log_prob, advantages, mask = batch(21)
    gradients = []
    for scale, checkpointed in ((1.0, False), (1024.0, False), (1024.0, True)):
        leaf = log_prob.clone().requires_grad_()

        def loss(values):
            return sspo_loss(values, old_log_prob, advantages, mask, Gate())[0]

        value = checkpoint(loss, leaf, use_reentrant=False) if checkpointed else loss(leaf)
        (value * scale).backward()
        gradients.append(leaf.grad / scale)
    assert gradients[0].any()
    assert all(torch.equal(each, gradients[0]) for each in gradients)
