"""The sweep of `loss` over the tokens as one Triton kernel, for CUDA and ROCm.

Each program reads a block of one row and writes its gradient, without the factor per response, and its sums. No other
tensor of shape (bs, T) exists. The block sums of a row are added afterwards, in a fixed order and without atomics, so
the same input gives the same bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from verl_sspo.algorithm.gates import Gate
from verl_sspo.algorithm.metrics import FAR, MOVED, SUMS, TOTALS

COUNT = len(TOTALS) + len(SUMS)
_MOVED, _FAR = tl.constexpr(MOVED), tl.constexpr(FAR)
# z is clamped so that r - 1 > -1 and r^2 is finite in float32. Every gate saturates long before.
_LOG_SMALLEST, _LOG_LARGEST = tl.constexpr(-15.942385), tl.constexpr(39.92)
WARPS = 4
# Tokens per program. Micro-batches below 2^20 tokens get the smaller blocks, so that 8 x 4,096 tokens are 128 programs.
BLOCKS = (256, 1024)
_HALF_PI = tl.constexpr(1.5707963267948966)


@triton.jit
def _expm1(x):
    small = x * (1.0 + x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * (1.0 / 120.0 + x * (1.0 / 720.0))))))
    return tl.where(tl.abs(x) < 0.25, small, tl.exp(x) - 1.0)


@triton.jit
def _log1p(x):
    # log(y) x / (y - 1) with y = 1 + x corrects the rounding of y.
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * x / tl.where(y == 1.0, 1.0, y - 1.0))


@triton.jit
def _atan(x):
    # Reduced to |x| <= tan(pi / 8), then a polynomial of degree 9: within 2 units in the last place of float32.
    a = tl.abs(x)
    large, middle = a > 2.414213562373095, a > 0.4142135623730950
    reduced = tl.where(large, -1.0 / tl.where(large, a, 1.0), tl.where(middle, (a - 1.0) / (a + 1.0), a))
    s = reduced * reduced
    p = ((8.05374449538e-2 * s - 1.38776856032e-1) * s + 1.99777106478e-1) * s - 3.33329491539e-1
    value = tl.where(large, _HALF_PI, tl.where(middle, 0.5 * _HALF_PI, 0.0)) + (p * s * reduced + reduced)
    return tl.where(x < 0, -value, value)


@triton.jit
def _shape(u, SHAPE: tl.constexpr):
    """G(u) and G'(u) of `gates`."""
    if SHAPE == "arctan":
        return _atan(u), 1.0 / (1.0 + u * u)
    elif SHAPE == "sigmoid":
        decay = tl.exp(-tl.abs(u))
        s = u * u
        small = 0.5 * u * (1.0 - s * (1.0 / 12.0 - s * (1.0 / 120.0 - s * (17.0 / 20160.0 - s * (31.0 / 362880.0)))))
        large = (1.0 - decay) / (1.0 + decay)
        half_tanh = tl.where(tl.abs(u) < 0.5, small, tl.where(u < 0, -large, large))
        return 2.0 * half_tanh, 4.0 * decay / ((1.0 + decay) * (1.0 + decay))
    elif SHAPE == "erf":
        return 1.2533141373155003 * tl.erf(u * 0.7071067811865476), tl.exp(-0.5 * u * u)
    else:
        v = tl.minimum(tl.maximum(u, -1.0e18), 1.0e18)
        v = tl.where(u != u, u, v)
        inverse = 1.0 / tl.sqrt(1.0 + v * v)
        return v * inverse, inverse * inverse * inverse


@triton.jit
def _gate(z, tau, SHAPE: tl.constexpr, RATIO: tl.constexpr):
    """log f, log f(1), kappa and kappa(0): `Gate.log_value_and_slope` and the values on policy."""
    if not RATIO:
        value, slope = _shape(tau * z, SHAPE)
        return value / tau, tl.zeros_like(z), slope, tl.full(z.shape, 1.0, tl.float32)
    clamped = tl.minimum(tl.maximum(z, _LOG_SMALLEST), _LOG_LARGEST)
    deviation = _expm1(tl.where(z != z, z, clamped))
    u = tau * deviation
    if SHAPE == "sigmoid":  # SAPO's gate: (4 / tau) sigma(u)
        decay = tl.exp(-tl.abs(u))
        log_sigma = tl.minimum(u, 0.0) - _log1p(decay)
        log_sigma = tl.where(u != u, u, log_sigma)
        sigma_of_minus_u = tl.where(u > 0, decay, 1.0) / (1.0 + decay)
        slope = tau * (1.0 + deviation) * sigma_of_minus_u
        return log_sigma + tl.log(4.0 / tau), tl.log(2.0 / tau), slope, 0.5 * tau
    value, slope = _shape(u, SHAPE)
    f_minus_1 = value / tau
    # |G(u)| <= |u| gives f >= r for r < 1; rounding must not break it.
    f_minus_1 = tl.where(u != u, u, tl.maximum(f_minus_1, tl.minimum(deviation, 0.0)))
    slope = slope * (1.0 + deviation) / (1.0 + f_minus_1)
    return _log1p(f_minus_1), tl.zeros_like(z), slope, tl.full(z.shape, 1.0, tl.float32)


@triton.jit
def sweep_kernel(
    log_prob, old_log_prob, advantages, mask, weights, gradient, sums,
    tau_pos, tau_neg, length, blocks,
    SHAPE: tl.constexpr, RATIO: tl.constexpr, FORWARD: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    at = row * length + column
    valid = tl.load(mask + at, mask=column < length, other=0) != 0
    taken = valid
    log_w = tl.zeros([BLOCK], tl.float32)
    if WEIGHTED:
        w = tl.load(weights + at, mask=valid, other=0.0).to(tl.float32)
        taken = valid & (w != 0.0)  # weight 0: as if it were masked
        log_w = tl.where(taken, tl.log(tl.where(taken, w, 1.0)), 0.0)
    new = tl.load(log_prob + at, mask=taken, other=0.0).to(tl.float32)
    old = tl.load(old_log_prob + at, mask=taken, other=0.0).to(tl.float32)
    a = tl.load(advantages + at, mask=taken, other=0.0).to(tl.float32)
    z = new - old
    tau = tl.where(a > 0, tau_pos, tau_neg)
    log_f, log_f_1, slope, slope_1 = _gate(z, tau, SHAPE, RATIO)
    toward = tl.where(a > 0, z, tl.where(a < 0, -z, 0.0 * z))
    if FORWARD:
        slope = tl.where(toward > 0, slope, tl.where(z != z, z, 1.0))
    tl.store(gradient + at, tl.where(taken, a * slope, 0.0), mask=column < length)

    # In the order of `metrics.TOTALS` and `metrics.SUMS`.
    lost = tl.where(taken, 1.0 - slope / slope_1, 0.0)
    distance = tl.abs(z)
    out = sums + (row * blocks + block) * COUNT
    tl.store(out, tl.sum(valid.to(tl.float32)))
    tl.store(out + 1, tl.sum(taken.to(tl.float32)))
    tl.store(out + 2, tl.sum(a))
    tl.store(out + 3, tl.sum(tl.where(taken, log_f, 0.0)))
    tl.store(out + 4, tl.sum(tl.where(taken, log_f_1, 0.0)))
    tl.store(out + 5, tl.sum(log_w))
    tl.store(out + 6, tl.sum(lost))
    tl.store(out + 7, tl.sum(-z))
    tl.store(out + 8, tl.sum(distance))
    tl.store(out + 9, tl.sum(tl.where(toward > 0, lost, 0.0)))
    tl.store(out + 10, tl.sum(tl.where(toward < 0, lost, 0.0)))
    tl.store(out + 11, tl.sum(tl.where(a > 0, lost, 0.0)))
    tl.store(out + 12, tl.sum(tl.where(a < 0, lost, 0.0)))
    tl.store(out + 13, tl.sum((toward > _MOVED).to(tl.float32)))
    tl.store(out + 14, tl.sum((toward < -_MOVED).to(tl.float32)))
    tl.store(out + 15, tl.sum((distance > _FAR).to(tl.float32)))


def constants(gate: Gate, weighted: bool, block: int) -> dict[str, Any]:
    """The kernel's compile-time constants."""
    return {
        "SHAPE": gate.shape,
        "RATIO": gate.domain == "ratio",
        "FORWARD": gate.side == "forward",
        "WEIGHTED": weighted,
        "BLOCK": block,
        "COUNT": COUNT,
    }


def sweep(
    gate: Gate,
    response_mask: torch.Tensor,
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`loss.sweep` in float32 as a kernel, with the same results.

    Raises:
        RuntimeError: if Triton cannot compile or launch the kernel; the message names a workaround.
    """
    rows, length = log_prob.shape
    gradient = torch.empty(log_prob.shape, dtype=torch.float32, device=log_prob.device)
    size = BLOCKS[log_prob.numel() >= 1 << 20]
    blocks = triton.cdiv(length, size)
    sums = torch.empty((rows, blocks, COUNT), dtype=torch.float32, device=log_prob.device)
    mask = response_mask.contiguous()
    try:
        sweep_kernel[(rows, blocks)](
            log_prob.contiguous(),
            old_log_prob.contiguous(),
            advantages.contiguous(),
            mask.view(torch.uint8) if mask.dtype == torch.bool else mask,
            sums if rollout_is_weights is None else rollout_is_weights.contiguous(),
            gradient,
            sums,
            gate.tau_pos,
            gate.tau_neg,
            length,
            blocks,
            **constants(gate, rollout_is_weights is not None, size),
            num_warps=WARPS,
        )
    except Exception as error:  # whatever Triton, the driver or a missing compiler raises
        raise RuntimeError(
            f"SSPO's Triton kernel failed ({type(error).__name__}: {error}). Train without it: "
            "actor_rollout_ref.actor.policy_loss.kernel=torch"
        ) from error
    return gradient, sums.sum(dim=1)
