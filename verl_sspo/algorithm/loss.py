"""The SSPO policy loss and its gradient in closed form (arXiv:2602.19327).

For response i with valid tokens t = 1..n_i, z_t = log_prob - old_log_prob, gate f with slope kappa:

    S_i       = exp( (1/n_i) sum_t log f(z_t) )                  the sequence weight, a geometric mean
    loss_t    = -A_t w_i S_i                                     w_i: rollout correction, 1 without
    dloss_t/dz_t = -A_t w_i S_i kappa(z_t)

With A constant over a response and `loss_agg_mode="seq-mean-token-mean"` this is -mean_i A_i S_i and its exact
gradient. Otherwise it is the token-wise form s_t = sg[S_i] exp(log f_t - sg[log f_t]), whose value and gradient
it reproduces. `verl_sspo.algorithm.reference` holds that form as plain autograd; the tests compare the two.
"""

import functools
import importlib.util
import logging
import math
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import FunctionCtx, once_differentiable

from verl_sspo.algorithm.gates import Gate
from verl_sspo.algorithm.metrics import Statistics, TokenSums

logger = logging.getLogger(__name__)

# Tokens whose intermediates stay in the cache of a CPU core.
_CPU_BLOCK_TOKENS = 1 << 16


def sspo_loss(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    gate: Gate,
    *,
    loss_agg_mode: str = "seq-mean-token-mean",
    rollout_is_weights: torch.Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: int | torch.Tensor | None = None,
    global_batch_size: int | torch.Tensor | None = None,
    loss_scale_factor: float | None = None,
    use_torch_compile: bool = True,
) -> tuple[torch.Tensor, Statistics]:
    """Computes the SSPO loss of a micro-batch and the statistics of its gates.

    Computed in float32, or in float64 if an input is float64. Only tokens with `response_mask` take part: whatever
    stands elsewhere, NaN included, changes neither value nor gradient. A response without a valid token
    contributes exactly 0. A NaN at a valid token makes the loss NaN; an infinite log-ratio saturates its gate.

    Args:
        log_prob: log-probabilities of the current policy, (bs, response_length), any float dtype; gets the gradient.
        old_log_prob: log-probabilities of the policy before the update, (bs, response_length).
        advantages: (bs, response_length).
        response_mask: 1 or True at valid tokens, (bs, response_length).
        gate: the gate and its temperatures.
        loss_agg_mode: verl's modes, see `sequence_coefficients`. SSPO is "seq-mean-token-mean".
        rollout_is_weights: verl's rollout-correction weights, (bs, response_length) or None. They enter as one
            weight a response, their geometric mean over its valid tokens.
        dp_size, batch_num_tokens, global_batch_size, loss_scale_factor: verl's `config.global_batch_info`. With
            them, micro-batches sum and data-parallel ranks average to the loss of the mini-batch.
        use_torch_compile: on CUDA, run as fused kernels where torch can compile them; without effect elsewhere.

    Returns:
        (loss, statistics): a scalar, and what `Statistics.as_metrics` brings to the host in one transfer.

    Raises:
        ValueError: on shapes that differ, an unknown mode, or dp_size > 1 without the global size it needs.
    """
    shapes = {tuple(t.shape) for t in (log_prob, old_log_prob, advantages, response_mask)}
    if rollout_is_weights is not None:
        shapes.add(tuple(rollout_is_weights.shape))
    if len(shapes) != 1 or log_prob.dim() != 2:
        raise ValueError(f"the loss needs tensors of one shape (bs, response_length), got {sorted(shapes)}")
    dtype = torch.promote_types(torch.promote_types(log_prob.dtype, old_log_prob.dtype), torch.float32)
    log_prob, old_log_prob, advantages = log_prob.contiguous(), old_log_prob.contiguous(), advantages.contiguous()
    mask = response_mask.bool().contiguous()
    lengths = mask.sum(dim=-1)
    coefficients = sequence_coefficients(
        lengths,
        loss_agg_mode,
        response_length=mask.shape[-1],
        dtype=dtype,
        dp_size=dp_size,
        batch_num_tokens=batch_num_tokens,
        global_batch_size=global_batch_size,
        loss_scale_factor=loss_scale_factor,
    )
    if rollout_is_weights is not None:
        coefficients = coefficients * rollout_sequence_weights(rollout_is_weights.detach().to(dtype), mask, lengths)
    old_log_prob, advantages = old_log_prob.detach(), advantages.detach()

    inputs = {"log_prob": log_prob.detach(), "old_log_prob": old_log_prob, "advantages": advantages}
    if rollout_is_weights is not None:
        inputs["rollout_is_weights"] = rollout_is_weights

    def apply(
        mask: torch.Tensor, lengths: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, TokenSums]:
        loss, weights, *sums = _SSPOLoss.apply(
            log_prob, old_log_prob, advantages, mask, lengths, coefficients.to(dtype), gate, dtype, use_torch_compile
        )
        return loss, weights, TokenSums(*sums)

    @torch.no_grad()
    def sums_of_finite_tokens() -> TokenSums:
        finite = mask & (log_prob - old_log_prob).isfinite() & advantages.isfinite()
        # float64: sums of finite numbers stay finite.
        return apply(finite, finite.sum(dim=-1), torch.float64)[2]

    loss, weights, sums = apply(mask, lengths, dtype)
    return loss, Statistics(loss.detach(), sums, weights, lengths, inputs, mask, sums_of_finite_tokens)


def sequence_coefficients(
    lengths: torch.Tensor,
    loss_agg_mode: str,
    *,
    response_length: int,
    dtype: torch.dtype = torch.float32,
    dp_size: int = 1,
    batch_num_tokens: int | torch.Tensor | None = None,
    global_batch_size: int | torch.Tensor | None = None,
    loss_scale_factor: float | None = None,
) -> torch.Tensor:
    """The factor of every token loss of a response in the aggregated loss: what verl's `agg_loss` does, by rows.

    All of verl's modes weigh the tokens of one response equally, so a mode is one number a response.

    Args:
        lengths: valid tokens of each response, (bs,).
        loss_agg_mode: "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean" or
            "seq-mean-token-sum-norm".
        response_length: padded length, the norm of "seq-mean-token-sum-norm" without `loss_scale_factor`.
        dtype: of the result.
        dp_size, batch_num_tokens, global_batch_size, loss_scale_factor: as in `sspo_loss`.

    Returns:
        (bs,), 0 for a response without a valid token.

    Raises:
        ValueError: on an unknown mode, or dp_size > 1 without the global size the mode needs.
    """
    nonempty = (lengths > 0).to(dtype)
    if loss_agg_mode == "token-sum":
        return nonempty * dp_size
    if loss_agg_mode == "token-mean":
        if batch_num_tokens is None:
            if dp_size > 1:
                raise ValueError("token-mean needs batch_num_tokens of the global batch when dp_size > 1")
            batch_num_tokens = lengths.sum().clamp(min=1)
        return nonempty * dp_size / batch_num_tokens
    if loss_agg_mode not in ("seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"):
        raise ValueError(
            f"loss_agg_mode={loss_agg_mode!r} is unknown: use seq-mean-token-mean (SSPO), token-mean, token-sum, "
            "seq-mean-token-sum or seq-mean-token-sum-norm"
        )
    if global_batch_size is None:
        if dp_size > 1:
            raise ValueError(f"{loss_agg_mode} needs global_batch_size of the global batch when dp_size > 1")
        global_batch_size = nonempty.sum().clamp(min=1)
    coefficients = nonempty * dp_size / global_batch_size
    if loss_agg_mode == "seq-mean-token-mean":
        return coefficients / lengths.clamp(min=1)
    if loss_agg_mode == "seq-mean-token-sum-norm":
        return coefficients / (response_length if loss_scale_factor is None else loss_scale_factor)
    return coefficients


def rollout_sequence_weights(
    rollout_is_weights: torch.Tensor, response_mask: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """One rollout-correction weight a response: the geometric mean over its valid tokens, (bs,)."""
    log_weights = rollout_is_weights.log().masked_fill(~response_mask, 0.0)
    return torch.exp(log_weights.sum(dim=-1) / lengths.clamp(min=1))


class _SSPOLoss(torch.autograd.Function):
    """Loss and gradient in one pass over the tokens; the gradient is all that is kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        log_prob: torch.Tensor,
        old_log_prob: torch.Tensor,
        advantages: torch.Tensor,
        mask: torch.Tensor,
        lengths: torch.Tensor,
        coefficients: torch.Tensor,
        gate: Gate,
        dtype: torch.dtype,
        use_torch_compile: bool,
    ) -> tuple[torch.Tensor, ...]:
        batch_size, response_length = log_prob.shape
        gradient = torch.empty(log_prob.shape, dtype=dtype, device=log_prob.device)
        weights = torch.empty(batch_size, dtype=dtype, device=log_prob.device)
        device = log_prob.device.type
        loss_of_rows = _compiled_loss_of_rows() if use_torch_compile and device == "cuda" else _loss_of_rows
        per_row = (log_prob.detach(), old_log_prob, advantages, mask, lengths, coefficients, gradient, weights)
        # On a CPU, blocks of rows keep the intermediates in the cache: each tensor crosses the memory bus once.
        rows = max(1, _CPU_BLOCK_TOKENS // max(1, response_length)) if device == "cpu" else batch_size
        whole = rows >= batch_size
        first, *others = [per_row] if whole else zip(*(tensor.split(rows) for tensor in per_row), strict=True)
        loss, sums = loss_of_rows(gate, *first)
        for block in others:
            block_loss, block_sums = loss_of_rows(gate, *block)
            loss += block_loss
            sums += block_sums
        ctx.save_for_backward(gradient)
        ctx.log_prob_dtype = log_prob.dtype  # type: ignore[attr-defined]
        statistics = (weights, sums.sums, sums.largest)
        ctx.mark_non_differentiable(*statistics)
        return loss, *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (grad_loss * gradient).to(ctx.log_prob_dtype), *[None] * 8


@functools.cache
def _compiled_loss_of_rows() -> Callable[..., tuple[torch.Tensor, TokenSums]]:
    """`_loss_of_rows` as the few kernels that torch.compile fuses it to, or as it is where torch cannot compile."""
    compiler = os.environ.get("CC") or "gcc"
    if importlib.util.find_spec("triton") is None or not (shutil.which(compiler) or shutil.which("clang")):
        logger.warning("the SSPO loss runs unfused: torch.compile needs triton and a C compiler on CUDA")
        return _loss_of_rows
    return torch.compile(_loss_of_rows, dynamic=True)


def _loss_of_rows(
    gate: Gate,
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    lengths: torch.Tensor,
    coefficients: torch.Tensor,
    gradient_out: torch.Tensor,
    weights_out: torch.Tensor,
) -> tuple[torch.Tensor, TokenSums]:
    """Loss of whole rows; writes their gradient (rows, T) and sequence weights relative to on-policy (rows,).

    Everything is computed in the dtype of `gradient_out`. Tensors are overwritten as soon as they have served: six of
    (rows, T) are alive at a time, and on a CPU a new one costs as much as the arithmetic on it.
    """
    dtype = gradient_out.dtype
    keep = _valid_bits(mask, dtype)
    log_ratio = log_prob.to(dtype) - old_log_prob.to(dtype)
    log_ratio.view(keep.dtype).bitwise_and_(keep)
    advantages = (advantages.to(dtype).view(keep.dtype) & keep).view(dtype)
    del keep
    # Added to the smaller temperature, so that it is exact and the rounding small beside the larger one.
    takes_larger = torch.gt if gate.tau_pos > gate.tau_neg else torch.le
    tau = takes_larger(advantages, 0.0, out=torch.empty_like(advantages))
    tau.mul_(abs(gate.tau_pos - gate.tau_neg)).add_(min(gate.tau_pos, gate.tau_neg))
    log_f, slope = gate.log_value_and_slope(log_ratio, tau)
    if gate.side == "forward":
        moved_forward = torch.sign(advantages).mul_(log_ratio)
        slope.sub_(1.0).mul_(torch.gt(moved_forward, 0.0, out=moved_forward)).add_(1.0)
        del moved_forward

    counts = lengths.clamp(min=1)
    # Tiny temperatures allow weights beyond the dtype's range: keep them, and their product with A, finite.
    largest = 0.45 * math.log(torch.finfo(dtype).max)
    if gate.is_sapo:  # f(1) = 2 / tau: masked tokens are not neutral, and the reported weight is S / f(1)
        keep = _valid_bits(mask, dtype)
        log_f.view(keep.dtype).bitwise_and_(keep)
        log_on_policy = gate.on_policy_value(tau).log_()
        log_on_policy.view(keep.dtype).bitwise_and_(keep)
        log_weights = (log_f.sum(dim=-1) / counts).clamp(max=largest)
        torch.exp(log_weights - log_on_policy.sum(dim=-1) / counts, out=weights_out)
        del keep, log_on_policy
    else:
        log_weights = (log_f.sum(dim=-1) / counts).clamp(max=largest)
        torch.exp(log_weights, out=weights_out)
    del log_f

    scale = -coefficients * torch.exp(log_weights)
    loss = torch.dot(scale, advantages.sum(dim=-1))
    torch.mul(advantages, scale.unsqueeze(-1), out=gradient_out).mul_(slope)
    if gate.is_sapo:
        slope.div_(gate.on_policy_slope(tau))
    del tau
    return loss, TokenSums.of(log_ratio, slope, advantages, lengths)


def _valid_bits(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Integers of the width of `dtype` with every bit set at valid tokens and none elsewhere.

    `x & bits` is x at valid tokens and 0 elsewhere, whatever stands there, and on a CPU many times faster than
    torch.where.
    """
    return mask.to(torch.int64 if dtype == torch.float64 else torch.int32).neg_()
