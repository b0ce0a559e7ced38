"""The diagnostics of the SSPO loss: every key that it logs, defined here and nowhere else.

z is the log-ratio log_prob - old_log_prob of a valid token, A its advantage. The slope of a token is
kappa(z) / kappa(0): the share of its on-policy gradient that the gate lets through, 1 on policy. A forward token
has moved the way its advantage pushes (sgn(A) z > 0.1), a corrective token against it (sgn(A) z < -0.1). The
weight of a response is S_i / f(1), the geometric mean of its gates, 1 on policy.

verl logs `sspo/x` as `actor/sspo/x`: averaged over the micro-batches of an update, then over the updates of a step;
of the latter, keys ending in `_min` / `_max` keep the smallest / largest. Averages leave non-finite log-ratios out
and count them. Where no token is of a kind, its slope is reported as 1 and its share as 0.

| key | meaning |
|---|---|
| `actor/ppo_kl` | mean of -z, verl's estimate of KL(old, new), nats |
| `sspo/slope` | mean slope: the effective update ratio |
| `sspo/slope_positive`, `sspo/slope_negative` | the same over tokens with A > 0, A < 0 |
| `sspo/slope_forward`, `sspo/slope_corrective` | the same over forward, corrective tokens |
| `sspo/share_corrective` | corrective tokens as a share of all valid tokens |
| `sspo/share_forward` | forward tokens as a share of all valid tokens |
| `sspo/closed_positive`, `sspo/closed_negative` | share of tokens with slope < 0.1 among those with A > 0, A < 0 |
| `sspo/sequence_weight`, `sspo/sequence_weight_std` | mean and standard deviation (population) of the weights |
| `sspo/sequence_weight_min`, `sspo/sequence_weight_max` | smallest and largest weight |
| `sspo/effective_sample_size` | (sum S)^2 / (N sum S^2), as a share of N responses |
| `sspo/abs_log_ratio`, `sspo/abs_log_ratio_max` | mean and largest abs(z) |
| `sspo/tokens`, `sspo/sequences` | valid tokens, and responses with at least one, per micro-batch |
| `sspo/nonfinite_log_ratios` | valid tokens whose z is NaN or infinite, per micro-batch |
"""

import math
from dataclasses import dataclass

import torch

MOVED = 0.1  # |z| from which a token counts as forward or corrective
CLOSED = 0.1  # slope under which a gate counts as closed

# What is summed over valid tokens with a finite z, in the order of `TokenSums.sums`.
_SUMS = (
    *("z", "abs_z", "nonfinite"),
    *("count", "slope"),
    *("count_positive", "slope_positive", "closed_positive"),
    *("count_negative", "slope_negative", "closed_negative"),
    *("count_forward", "slope_forward"),
    *("count_corrective", "slope_corrective"),
)


@dataclass
class TokenSums:
    """Sums over tokens that add up over blocks of rows.

    Args:
        sums: of `_SUMS`, (15,).
        largest: largest finite |z|, a scalar.
    """

    sums: torch.Tensor
    largest: torch.Tensor

    @classmethod
    def zeros(cls, dtype: torch.dtype, device: torch.device) -> "TokenSums":
        sums = torch.zeros(len(_SUMS), dtype=dtype, device=device)
        return cls(sums, sums.new_zeros(()))

    @classmethod
    def of(
        cls, log_ratio: torch.Tensor, slope: torch.Tensor, advantages: torch.Tensor, valid: torch.Tensor
    ) -> "TokenSums":
        """Sums over a block.

        A set of tokens is a tensor of 0.0 and 1.0, and one buffer holds one set after the other: a CPU sums products
        of floats many times faster than it selects by a boolean mask, as long as they stay in its cache.

        Args:
            log_ratio, slope, advantages: (rows, T), log_ratio and advantages 0 at tokens that are not valid.
            valid: 1.0 at valid tokens, 0.0 elsewhere, (rows, T), in the dtype of the others.
        """
        z = torch.nan_to_num(log_ratio, nan=0.0, posinf=0.0, neginf=0.0)
        members = torch.eq(z, log_ratio, out=torch.empty_like(z)).mul_(valid)  # valid and finite
        slope = torch.nan_to_num(slope, nan=0.0).mul_(members)
        closed = torch.lt(slope, CLOSED, out=torch.empty_like(slope))
        signed = advantages * members

        def over_members(*summands: torch.Tensor) -> list[torch.Tensor]:
            return [members.sum(), *(torch.dot(members.view(-1), summand.view(-1)) for summand in summands)]

        count = members.sum()
        sums = [z.sum(), z.abs_().sum(), valid.sum() - count, count, slope.sum()]
        largest = z.max() if z.numel() else z.new_zeros(())
        torch.gt(signed, 0.0, out=members)
        sums += over_members(slope, closed)
        torch.lt(signed, 0.0, out=members)
        sums += over_members(slope, closed)
        moved = signed.sign_().mul_(log_ratio)  # NaN, and so in no set, where z is not finite
        torch.gt(moved, MOVED, out=members)
        sums += over_members(slope)
        torch.lt(moved, -MOVED, out=members)
        sums += over_members(slope)
        return cls(torch.stack(sums), largest)

    def __iadd__(self, other: "TokenSums") -> "TokenSums":
        self.sums += other.sums
        torch.maximum(self.largest, other.largest, out=self.largest)
        return self


@dataclass(frozen=True)
class Statistics:
    """What the loss saw of a micro-batch, still on the device.

    Args:
        tokens: sums over the valid tokens.
        weights: sequence weights relative to on-policy, (bs,).
        lengths: valid tokens of each response, (bs,).
    """

    tokens: TokenSums
    weights: torch.Tensor
    lengths: torch.Tensor

    def as_metrics(self) -> dict[str, float]:
        """The metrics of this module's table: always the same keys, all finite, one device-to-host transfer."""
        parts = (self.tokens.sums, self.tokens.largest.view(1), self.weights, self.lengths.to(self.weights.dtype))
        numbers = torch.cat(parts).tolist()  # the one transfer
        total = dict(zip((*_SUMS, "largest"), numbers, strict=False))
        responses = len(self.weights)
        lengths = numbers[-responses:] if responses else []
        weights = numbers[-2 * responses : -responses] if responses else []
        weights = [w for w, length in zip(weights, lengths, strict=True) if length and math.isfinite(w)] or [1.0]
        weight_mean = math.fsum(weights) / len(weights)
        weight_variance = math.fsum((w - weight_mean) ** 2 for w in weights) / len(weights)

        def mean(name: str, count: str, empty: float) -> float:
            return total[name] / total[count] if total[count] else empty

        square_mean = weight_mean**2 + weight_variance
        return {
            "actor/ppo_kl": -mean("z", "count", 0.0),
            "sspo/slope": mean("slope", "count", 1.0),
            "sspo/slope_positive": mean("slope_positive", "count_positive", 1.0),
            "sspo/slope_negative": mean("slope_negative", "count_negative", 1.0),
            "sspo/slope_forward": mean("slope_forward", "count_forward", 1.0),
            "sspo/slope_corrective": mean("slope_corrective", "count_corrective", 1.0),
            "sspo/share_forward": mean("count_forward", "count", 0.0),
            "sspo/share_corrective": mean("count_corrective", "count", 0.0),
            "sspo/closed_positive": mean("closed_positive", "count_positive", 0.0),
            "sspo/closed_negative": mean("closed_negative", "count_negative", 0.0),
            "sspo/sequence_weight": weight_mean,
            "sspo/sequence_weight_std": math.sqrt(weight_variance),
            "sspo/sequence_weight_min": min(weights),
            "sspo/sequence_weight_max": max(weights),
            "sspo/effective_sample_size": weight_mean**2 / square_mean if square_mean else 1.0,
            "sspo/abs_log_ratio": mean("abs_z", "count", 0.0),
            "sspo/abs_log_ratio_max": total["largest"],
            "sspo/tokens": total["count"] + total["nonfinite"],
            "sspo/sequences": float(sum(length > 0 for length in lengths)),
            "sspo/nonfinite_log_ratios": total["nonfinite"],
        }
