"""The loss: equal to the plain formula, and well-behaved for any numbers."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from verl.trainer.ppo.core_algos import agg_loss

from properties import Property
from verl_sspo.algorithm.gates import DOMAINS, LEVELS, SHAPES, SIDES, Gate
from verl_sspo.algorithm.loss import sspo_loss
from verl_sspo.algorithm.reference import sspo_loss_matrix

AGG_MODES = ("seq-mean-token-mean", "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm")
# Largest value of each shape: G(inf).
LIMITS = {"arctan": math.pi / 2, "sigmoid": 2.0, "erf": math.sqrt(math.pi / 2), "softsign": 1.0}
# Values at masked tokens, and values that a broken kernel or a masked logit can leave.
GARBAGE = (0.0, -0.0, math.nan, math.inf, -math.inf, 1e30, -1e30)
EXTREMES = (0.0, math.inf, -math.inf, 1e30, -1e30, 200.0, -1e4, torch.finfo(torch.float32).min)


@dataclass(frozen=True)
class Batch:
    """The tensors that verl passes to a loss, (rows, tokens) each. `weights` may be None."""

    log_prob: torch.Tensor
    old_log_prob: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    weights: torch.Tensor | None

    def map(self, function) -> "Batch":
        """Applies `function` to each tensor."""
        return Batch(*(None if t is None else function(t) for t in vars(self).values()))

    @property
    def trained(self) -> torch.Tensor:
        """The tokens that take part."""
        return self.mask if self.weights is None else self.mask & (self.weights != 0)


@st.composite
def gates(draw) -> Gate:
    temperatures = st.floats(-3.0, 3.0).map(lambda exponent: 10.0**exponent)
    shape, domain = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(DOMAINS))
    sides = SIDES if (shape, domain) != ("sigmoid", "ratio") else ("both",)
    return Gate(
        shape,
        domain,
        draw(temperatures),
        draw(temperatures),
        draw(st.sampled_from(sides)),
        draw(st.sampled_from(LEVELS)),
    )


@st.composite
def batches(draw, dtypes=(torch.float64,), extremes=False) -> Batch:
    """Ragged rows, some of them empty. Advantages may differ within a row."""
    shape = draw(st.integers(0, 4)), draw(st.integers(0, 6))

    def numbers(low: float, high: float, special=(), of=shape) -> torch.Tensor:
        elements = st.floats(low, high, width=32)
        elements = elements | st.sampled_from(special) if special else elements
        dtype = draw(st.sampled_from(dtypes))
        return torch.from_numpy(draw(arrays(np.float64, of, elements=elements))).to(dtype)

    special = EXTREMES if extremes else ()
    old_log_prob = numbers(-3.0, 0.0, special)
    log_prob = numbers(-3.0, 0.0, (*special, math.nan) if extremes else ())
    advantages = numbers(-100.0, 100.0, of=shape if draw(st.booleans()) else (shape[0], 1)).expand(shape)
    mask = torch.from_numpy(draw(arrays(np.bool_, shape)))
    weights = numbers(0.015625, 8.0, (0.0,)) if draw(st.booleans()) else None
    return Batch(log_prob, old_log_prob, advantages, mask, weights)


@st.composite
def global_sizes(draw) -> dict:
    """verl's `config.global_batch_info`, of a batch with at least one valid token."""
    return {
        "dp_size": draw(st.integers(1, 8)),
        "batch_num_tokens": draw(st.integers(1, 10_000)),
        "global_batch_size": draw(st.integers(1, 1000)),
        "loss_scale_factor": draw(st.none() | st.floats(0.5, 1e4)),
    }


def _evaluate(batch: Batch, gate: Gate, mode: str, sizes: dict):
    leaf = batch.log_prob.clone().requires_grad_()
    loss, diagnostics = sspo_loss(
        leaf,
        batch.old_log_prob,
        batch.advantages,
        batch.mask,
        gate,
        loss_agg_mode=mode,
        rollout_is_weights=batch.weights,
        **sizes,
    )
    loss.backward()
    return loss.detach(), leaf.grad, diagnostics


def is_the_formula(batch: Batch, gate: Gate, mode: str, sizes: dict) -> None:
    """Value and gradient equal those of autograd on the plain formula, aggregated by verl."""
    assume(batch.mask.shape[1] or mode != "seq-mean-token-sum-norm" or sizes["loss_scale_factor"])
    leaf = batch.log_prob.clone().requires_grad_()
    matrix = sspo_loss_matrix(leaf, batch.old_log_prob, batch.advantages, batch.mask, gate, batch.weights)
    plain = agg_loss(matrix, batch.trained, mode, **sizes)
    plain.backward()
    # The plain formula overflows for large temperatures, and has no gradient there.
    assume(leaf.grad.isfinite().all())
    loss, gradient, _ = _evaluate(batch, gate, mode, sizes)
    scale = matrix.detach().abs().sum().item() * sizes["dp_size"]
    # verl divides by n + 1e-8.
    torch.testing.assert_close(loss, plain.detach(), rtol=1e-7, atol=1e-11 * scale)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-7, atol=1e-11 * scale)


def withstands_any_number(batch: Batch, garbage: float, gate: Gate, mode: str, sizes: dict) -> None:
    """Finite unless a valid token is NaN. Weights are bounded. Masked tokens and the dtype do not matter."""
    assume(batch.mask.shape[1] or mode != "seq-mean-token-sum-norm" or sizes["loss_scale_factor"])
    everywhere, mask, dtype = batch.mask, batch.trained, torch.float32
    for tensor in (batch.log_prob, batch.old_log_prob, batch.advantages, batch.weights):
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)

    def fill(number: float) -> Batch:
        """The batch with `number` at all tokens that do not take part."""
        filled = batch.map(lambda t: t if t is everywhere else torch.where(mask, t, number))
        weights = None if batch.weights is None else torch.where(everywhere, batch.weights, number)
        return replace(filled, weights=weights)

    dirty = fill(garbage)
    loss, gradient, diagnostics = _evaluate(dirty, gate, mode, sizes)
    metrics = diagnostics.as_metrics()

    log_ratio = batch.log_prob.to(dtype) - batch.old_log_prob.to(dtype)
    if log_ratio[mask].isnan().any():
        assert loss.isnan(), f"a NaN is hidden: {loss}"
    else:
        assert loss.isfinite(), f"loss {loss}"
    assert loss.dtype == dtype
    assert gradient.dtype == batch.log_prob.dtype
    assert loss.isnan() or (gradient[~mask] == 0).all(), "a masked token has a gradient"
    assert all(math.isfinite(value) for values in metrics.values() for value in values), metrics

    # Rounding of log f is relative to its size.
    largest = LIMITS[gate.shape] / min(gate.tau_pos, gate.tau_neg) * (1 + 1e-5)
    upper = math.exp(min(largest, 700.0)) if gate.domain == "log" else max(1 + largest, 2.0)
    weights = diagnostics.log_weights.exp()
    weights = weights[~weights.isnan()]
    assert (weights <= upper * (1 + 1e-5)).all()
    if gate.domain == "log":
        smallest = torch.finfo(dtype).tiny  # smaller values may be rounded to 0
        assert (weights >= math.exp(-largest) * (1 - 1e-5) - smallest).all()

    clean, clean_gradient, clean_diagnostics = _evaluate(fill(1.0), gate, mode, sizes)
    assert _same(clean, loss), "what stands at masked tokens matters"
    assert _same(clean_gradient, gradient), "what stands at masked tokens matters"
    assert clean_diagnostics.as_metrics() == metrics, "what stands at masked tokens matters"

    exact_input = dirty.map(lambda t: t if t is everywhere else t.to(dtype))
    exact, exact_gradient, _ = _evaluate(exact_input, gate, mode, sizes)
    torch.testing.assert_close(loss, exact, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(gradient, exact_gradient.to(gradient.dtype), rtol=0, atol=0, equal_nan=True)
    if not log_ratio[mask].isnan().any():
        assert exact_gradient.isfinite().all()


def weight_zero_is_mask_zero(batch: Batch, gate: Gate, mode: str, sizes: dict) -> None:
    """A token of rollout weight 0 gives, bit for bit, the value, gradient and diagnostics of a masked token."""
    assume(batch.weights is not None)
    assume(batch.mask.shape[1] or mode != "seq-mean-token-sum-norm" or sizes["loss_scale_factor"])
    masked = replace(batch, mask=batch.trained, weights=torch.where(batch.weights == 0, 1.0, batch.weights))
    for given in (sizes, {"loss_scale_factor": sizes["loss_scale_factor"]}):
        loss, gradient, diagnostics = _evaluate(batch, gate, mode, given)
        expected, expected_gradient, expected_diagnostics = _evaluate(masked, gate, mode, given)
        assert _same(loss, expected)
        assert _same(gradient, expected_gradient)
        ours, theirs = diagnostics.as_metrics(), expected_diagnostics.as_metrics()
        for name in ours:
            assert ours[name] == theirs[name] or name.endswith("left_out"), name
        assert not any(theirs["sspo/tokens_left_out"])


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether both are equal. NaN equals NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def knows_no_order(batch: Batch, order: int, padding: int, gate: Gate, mode: str, sizes: dict) -> None:
    """Each row has the same gradient as alone, whatever its position and the padding."""
    sizes = sizes | {"loss_scale_factor": sizes["loss_scale_factor"] or 5.0}
    loss, gradient, _ = _evaluate(batch, gate, mode, sizes)
    rows = torch.randperm(len(batch.mask), generator=torch.Generator().manual_seed(order))
    total, width = torch.zeros_like(loss), batch.mask.shape[1]
    for row in rows.tolist():
        alone = batch.map(
            lambda t, row=row: torch.nn.functional.pad(
                t[row : row + 1], (padding, 0), value=0 if t is batch.mask else math.nan
            )
        )
        part, part_gradient, _ = _evaluate(alone, gate, mode, sizes)
        total += part
        torch.testing.assert_close(part_gradient[0, padding:], gradient[row], rtol=1e-9, atol=1e-300)
        assert part_gradient.shape == (1, padding + width)
    scale = 100.0 * 8.0 * batch.mask.sum().item() * sizes["dp_size"] * math.exp(3.0)
    torch.testing.assert_close(total, loss, rtol=1e-9, atol=1e-13 * scale)


_SETTINGS = {"gate": gates(), "mode": st.sampled_from(AGG_MODES), "sizes": global_sizes()}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

PROPERTIES = {
    "loss.weight_zero": Property(
        weight_zero_is_mask_zero, {"batch": batches(_DTYPES, extremes=True), **_SETTINGS}, examples=40
    ),
    "loss.formula": Property(is_the_formula, {"batch": batches(), **_SETTINGS}, examples=40),
    "loss.numbers": Property(
        withstands_any_number,
        {"batch": batches(_DTYPES, extremes=True), "garbage": st.sampled_from(GARBAGE), **_SETTINGS},
        examples=40,
    ),
    "loss.order": Property(
        knows_no_order,
        {"batch": batches(), "order": st.integers(0, 99), "padding": st.integers(0, 3), **_SETTINGS},
        examples=40,
    ),
}
