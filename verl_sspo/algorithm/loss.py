"""The SSPO policy loss and its gradient in closed form (arXiv:2602.19327).

For response i with valid tokens t = 1..n_i, z_t = log_prob - old_log_prob, gate f with slope kappa:

    S_i          = exp( (1/n_i) sum_t log f(z_t) )        the sequence weight, a geometric mean
    loss_t       = -A_t w_i S_i                           w_i: rollout correction, 1 without
    dloss_t/dz_t = -A_t w_i S_i kappa(z_t)

`sweep` makes the only pass over the tokens; `kernel.sweep` does the same on a GPU. All later steps work on one number
per response: lengths, weights, and the factor that scales the gradient of its tokens in the backward pass.

With A constant over a response and `loss_agg_mode="seq-mean-token-mean"` this is -mean_i A_i w_i S_i and its exact
gradient. Otherwise it is the token-wise form s_t = sg[S_i] exp(log f_t - sg[log f_t]), with its value and gradient.
With a gate of level "sequence", z_t is the mean log-ratio of the response (`mean_log_ratios`); the rest is the same.
`verl_sspo.algorithm.reference` is the token-wise form in plain autograd; the tests compare the two.
"""

import functools
import importlib.util
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx, once_differentiable

from verl_sspo.algorithm.gates import Gate
from verl_sspo.algorithm.metrics import TOTALS, Diagnostics, token_sums

KERNELS = ("auto", "torch", "triton")

# On a CPU, rows are computed in blocks of about this many tokens, so that intermediates stay in the cache.
_CPU_BLOCK_TOKENS = 1 << 17


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
    kernel: str = "auto",
) -> tuple[torch.Tensor, Diagnostics]:
    """Computes the SSPO loss of a micro-batch and its diagnostics.

    Computed in float32, or in float64 if any input is float64. A token takes part if `response_mask` is true and its
    rollout weight is not exactly 0. Values at other tokens, even NaN, change neither the loss nor its gradient. A
    response without a token that takes part contributes exactly 0. A NaN or a negative rollout weight at a token that
    takes part makes the loss NaN. An infinite log-ratio saturates its gate.

    Args:
        log_prob: log-probabilities of the current policy, (bs, response_length), any float dtype; gets the gradient.
        old_log_prob: log-probabilities of the policy before the update, (bs, response_length).
        advantages: (bs, response_length).
        response_mask: 1 or True at valid tokens, (bs, response_length).
        gate: the gate and its temperatures.
        loss_agg_mode: one of verl's modes, see `sequence_coefficients`. SSPO is "seq-mean-token-mean".
        rollout_is_weights: verl's rollout-correction weights, (bs, response_length) or None. Each response gets one
            weight, the geometric mean over its tokens. A token of weight 0 is treated as if it were masked.
        dp_size, batch_num_tokens, global_batch_size, loss_scale_factor: verl's `config.global_batch_info`. With
            these, the sum over micro-batches, averaged over data-parallel ranks, is the loss of the mini-batch.
        kernel: "torch", "triton", or "auto": Triton on a GPU where it is installed, unless an input is float64.

    Returns:
        (loss, diagnostics): a scalar, and what `Diagnostics.as_metrics` turns into metrics.

    Raises:
        ValueError: if shapes differ, the mode is unknown, dp_size > 1 without the global size the mode needs, or
            kernel="triton" with an input in float64.
        RuntimeError: if the Triton kernel cannot be compiled or launched, or if its first result for a gate differs
            from PyTorch's.
    """
    inputs = {"log_prob": log_prob.detach(), "old_log_prob": old_log_prob, "advantages": advantages}
    if rollout_is_weights is not None:
        inputs["rollout_is_weights"] = rollout_is_weights
    shapes = {tuple(tensor.shape) for tensor in (*inputs.values(), response_mask)}
    if len(shapes) != 1 or log_prob.dim() != 2:
        raise ValueError(f"the loss needs tensors of one shape (bs, response_length), got {sorted(shapes)}")
    floating = [tensor.dtype for tensor in inputs.values() if tensor.is_floating_point()]
    dtype = functools.reduce(torch.promote_types, floating, torch.float32)
    with torch.no_grad():
        gated = inputs if gate.level == "token" else inputs | mean_log_ratios(response_mask, dtype, inputs)
        if runs_in_triton(kernel, log_prob.device, dtype):
            gradient, sums = _sweep_in_triton(gate, response_mask, dtype, gated)
        else:
            gradient, sums = sweep(gate, response_mask, dtype, **gated)
        valid_lengths, lengths, sum_of_advantages, log_gates, log_gates_on_policy, log_rollout_weights = sums[
            :, : len(TOTALS)
        ].unbind(dim=-1)
        coefficients = sequence_coefficients(
            lengths,
            loss_agg_mode,
            response_length=log_prob.shape[1],
            dtype=dtype,
            dp_size=dp_size,
            batch_num_tokens=batch_num_tokens,
            global_batch_size=global_batch_size,
            loss_scale_factor=loss_scale_factor,
        )
        counts = lengths.clamp(min=1)
        # A tiny temperature allows weights beyond the range of the dtype: keep them, and their product with A, finite.
        log_weights = (log_gates / counts).clamp(max=0.45 * math.log(torch.finfo(dtype).max))
        scale = -coefficients * torch.exp(log_rollout_weights / counts) * log_weights.exp()
        losses = scale * sum_of_advantages
        diagnostics = Diagnostics(
            losses,
            log_weights - log_gates_on_policy / counts,
            sums[:, len(TOTALS) :],
            lengths,
            valid_lengths,
            inputs,
            response_mask,
            batch_num_tokens,
            global_batch_size,
        )
    return _WithGradient.apply(log_prob, losses.sum(), gradient, scale), diagnostics


def mean_log_ratios(
    response_mask: torch.Tensor, dtype: torch.dtype, inputs: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Replaces `log_prob` and `old_log_prob` at sequence level: by each response's mean log-ratio, and by 0.

    The mean is over the tokens that take part. Its derivative with respect to one token's log-ratio is 1 / n, a factor
    that the loss's mean over tokens already has. So the gradient of a token is A kappa(mean z) instead of A kappa(z_t).
    """
    mask, weights = response_mask.bool(), inputs.get("rollout_is_weights")
    if weights is not None:
        mask = mask & (weights != 0)
    z = (inputs["log_prob"].to(dtype) - inputs["old_log_prob"].to(dtype)).masked_fill_(~mask, 0.0)
    # An infinite log-ratio saturates the gate, whatever else is in its response.
    total = z.clamp_(-1e30, 1e30).sum(dim=-1, keepdim=True)
    mean = total / mask.to(dtype).sum(dim=-1, keepdim=True).clamp(min=1)
    return {"log_prob": mean.expand_as(z).contiguous(), "old_log_prob": torch.zeros_like(z)}


def runs_in_triton(kernel: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the sweep over the tokens runs as a Triton kernel.

    Raises:
        ValueError: if `kernel` is "triton" and the computation is in float64.
    """
    if kernel == "triton" and dtype != torch.float32:
        raise ValueError(f"kernel='triton' computes in float32, but an input is {dtype}: use kernel='torch'")
    return kernel == "triton" or (
        kernel == "auto" and device.type == "cuda" and dtype == torch.float32 and _triton_is_installed()
    )


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


_compared: set[Gate] = set()  # gates whose kernel agrees with PyTorch on this machine


def _sweep_in_triton(
    gate: Gate, response_mask: torch.Tensor, dtype: torch.dtype, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sweep` by the kernel. A gate's first micro-batch is compared with PyTorch, to catch a miscompiled kernel."""
    from verl_sspo.algorithm.kernel import sweep as triton_sweep

    results = triton_sweep(gate, response_mask, **inputs)
    if gate not in _compared:
        expected = sweep(gate, response_mask, dtype, **inputs)
        # Far above rounding errors, far below those of a wrong formula; `verl-sspo gpu-check` measures exactly.
        agree = [
            torch.allclose(*pair, rtol=1e-3, atol=1e-2, equal_nan=True) for pair in zip(results, expected, strict=True)
        ]
        if not all(agree):
            raise RuntimeError(
                "SSPO's Triton kernel and PyTorch differ on this machine. Please report what `verl-sspo gpu-check` "
                "prints, and train without the kernel: actor_rollout_ref.actor.policy_loss.kernel=torch"
            )
        _compared.add(gate)
    return results


def sweep(
    gate: Gate,
    response_mask: torch.Tensor,
    dtype: torch.dtype,
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pass over the tokens, in `dtype`; arguments as in `sspo_loss`.

    Returns:
        A kappa(z) of each token, (bs, response_length), 0 at tokens that take no part; and the sums over the tokens of
        each response, (bs, len(TOTALS) + len(SUMS)), see `metrics`.
    """
    batch_size, response_length = log_prob.shape
    rows = max(1, _CPU_BLOCK_TOKENS // max(1, response_length)) if log_prob.is_cpu else max(1, batch_size)
    gradient = torch.empty(log_prob.shape, dtype=dtype, device=log_prob.device)
    by_row = [log_prob, old_log_prob, advantages, response_mask, gradient]
    if rollout_is_weights is not None:
        by_row.append(rollout_is_weights)
    blocks = zip(*(tensor.split(rows) for tensor in by_row), strict=True)
    return gradient, torch.cat([_sweep_rows(gate, *block) for block in blocks])


def _sweep_rows(
    gate: Gate,
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    gradient: torch.Tensor,
    rollout_is_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """`sweep` for a block of rows: writes `gradient` and returns the sums."""
    dtype, mask = gradient.dtype, response_mask.bool()
    # Counts are floats, exact below 2^24: a CPU sums them several times faster than booleans.
    lengths = valid_lengths = mask.to(dtype).sum(dim=-1)
    none = torch.zeros_like(lengths)
    log_rollout_weights = log_gates_on_policy = none
    if rollout_is_weights is not None:
        mask = mask & (rollout_is_weights != 0)
        lengths = mask.to(dtype).sum(dim=-1)
        log_rollout_weights = rollout_is_weights.to(dtype).log().masked_fill_(~mask, 0.0).sum(dim=-1)
    masked = ~mask
    z = (log_prob.to(dtype) - old_log_prob.to(dtype)).masked_fill_(masked, 0.0)
    advantages = advantages.to(dtype).masked_fill(masked, 0.0)
    # tau_pos where A > 0, else tau_neg; on a CPU several times faster than torch.where.
    tau = F.threshold(torch.gt(advantages, 0.0, out=torch.empty_like(z)).mul_(gate.tau_pos), 0.0, gate.tau_neg, True)
    log_f, slope = gate.log_value_and_slope(z, tau)
    if gate.is_sapo:  # f(1) is not 1 there, so log f is not 0 at masked tokens
        log_f.masked_fill_(masked, 0.0)
        log_gates_on_policy = gate.on_policy_value(tau).log_().masked_fill_(masked, 0.0).sum(dim=-1)
    log_gates = log_f.sum(dim=-1)
    del log_f  # the next tensor reuses its memory: on a CPU, new memory costs more than the arithmetic on it
    toward = torch.sign(advantages).mul_(z)  # > 0: the token moved the way its advantage pushes
    if gate.side == "forward":  # slope 1 elsewhere
        slope.sub_(1.0).mul_(torch.gt(toward, 0.0, out=torch.empty_like(z))).add_(1.0)
    torch.mul(advantages, slope, out=gradient)
    if gate.is_sapo:  # reported relative to the slope on policy
        slope /= gate.on_policy_slope(tau)
    totals = (valid_lengths, lengths, advantages.sum(dim=-1), log_gates, log_gates_on_policy, log_rollout_weights)
    return torch.cat([torch.stack(totals, dim=-1), token_sums(z, toward, slope, advantages)], dim=-1)


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
    """Computes the factor that verl's `agg_loss` gives to the token losses of each response.

    Args:
        lengths: tokens of each response that take part, (bs,).
        loss_agg_mode: one of verl's modes. In all of them the tokens of one response have the same factor.
        response_length: padded length, the divisor of "seq-mean-token-sum-norm" without `loss_scale_factor`.
        dtype: of the result.
        dp_size, batch_num_tokens, global_batch_size, loss_scale_factor: as in `sspo_loss`.

    Returns:
        (bs,), 0 for a response without tokens.

    Raises:
        ValueError: if the mode is unknown, or dp_size > 1 without the global size the mode needs.
    """
    divisors: dict[str, Any] = {
        "seq-mean-token-mean": lengths.clamp(min=1),
        "seq-mean-token-sum": 1,
        "seq-mean-token-sum-norm": response_length if loss_scale_factor is None else loss_scale_factor,
        "token-mean": 1,
        "token-sum": 1,
    }
    if loss_agg_mode not in divisors:
        raise ValueError(f"loss_agg_mode={loss_agg_mode!r} is unknown: use one of {', '.join(divisors)}")
    nonempty = (lengths > 0).to(dtype)
    if loss_agg_mode == "token-sum":
        return nonempty * dp_size
    name, size, local = ("batch_num_tokens", batch_num_tokens, lengths)
    if loss_agg_mode != "token-mean":
        name, size, local = ("global_batch_size", global_batch_size, nonempty)
    if size is None:
        if dp_size > 1:
            raise ValueError(f"{loss_agg_mode} needs {name} of the global batch when dp_size > 1")
        size = local.sum().clamp(min=1)
    return nonempty * dp_size / size / divisors[loss_agg_mode]


class _WithGradient(torch.autograd.Function):
    """A loss with a given gradient with respect to `log_prob`: a tensor, and a factor for each of its rows.

    Only these two are kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, log_prob: torch.Tensor, loss: torch.Tensor, gradient: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(gradient, scale)
        ctx.log_prob_dtype = log_prob.dtype  # type: ignore[attr-defined]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        gradient, scale = ctx.saved_tensors
        return (gradient * (grad_loss * scale).unsqueeze(-1)).to(ctx.log_prob_dtype), None, None, None
