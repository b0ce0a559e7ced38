"""The diagnostics of the SSPO loss: every key that it logs, defined here and nowhere else.

z is the log-ratio log_prob - old_log_prob of a valid token, A its advantage. The slope of a token is
kappa(z) / kappa(0): the share of its on-policy gradient that the gate lets through, 1 on policy. A forward token
has moved the way its advantage pushes (sgn(A) z > 0.1), a corrective token against it (sgn(A) z < -0.1). The
weight of a response is S_i / f(1), the geometric mean of its gates, 1 on policy.

verl logs `sspo/x` as `actor/sspo/x`, averaged over the micro-batches of a step; keys ending in `_min` / `_max`
keep the smallest / largest. Averages leave non-finite log-ratios out and count them. Where no token is of a kind,
its slope is reported as 1 and its share as 0.

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

from dataclasses import dataclass

import torch

MOVED = 0.1  # |z| from which a token counts as forward or corrective
CLOSED = 0.1  # slope under which a gate counts as closed

# Sets of valid tokens, and what is summed over each of them: the layout of `TokenSums.sums`.
_SETS = ("all", "positive", "negative", "forward", "corrective")
_SUMMANDS = ("count", "slope", "closed", "z", "abs_z")


@dataclass
class TokenSums:
    """Sums over tokens that add up over blocks of rows.

    Args:
        sums: (len(_SUMMANDS), len(_SETS) + 1); the last column counts non-finite log-ratios in its first row.
        largest: largest finite |z|, a scalar.
    """

    sums: torch.Tensor
    largest: torch.Tensor

    @classmethod
    def zeros(cls, dtype: torch.dtype, device: torch.device) -> "TokenSums":
        shape = (len(_SUMMANDS), len(_SETS) + 1)
        return cls(torch.zeros(shape, dtype=dtype, device=device), torch.zeros((), dtype=dtype, device=device))

    @classmethod
    def of(
        cls, log_ratio: torch.Tensor, slope: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor
    ) -> "TokenSums":
        """Sums over a block.

        Args:
            log_ratio, slope, advantages: (rows, T), with log_ratio and advantages 0 where `mask` is False.
            mask: valid tokens, (rows, T), bool.
        """
        finite = torch.isfinite(log_ratio)
        valid = mask & finite
        z = torch.where(finite, log_ratio, 0.0)
        slope = torch.where(valid, slope, 0.0)
        moved = torch.sign(advantages) * z
        sets = (
            valid,
            valid & (advantages > 0),
            valid & (advantages < 0),
            moved > MOVED,
            moved < -MOVED,
            mask & ~finite,
        )
        abs_z = z.abs()
        summands = (torch.ones_like(z), slope, (slope < CLOSED).to(z.dtype), z, abs_z)
        # Every sum over every set at once: one matrix product.
        left = torch.stack(summands).flatten(1)
        right = torch.stack(sets).flatten(1).to(z.dtype)
        largest = abs_z.max() if abs_z.numel() else z.new_zeros(())
        return cls(left @ right.T, largest)

    def __iadd__(self, other: "TokenSums") -> "TokenSums":
        self.sums += other.sums
        torch.maximum(self.largest, other.largest, out=self.largest)
        return self


@dataclass(frozen=True)
class Statistics:
    """What the loss saw of a micro-batch, still on the device.

    Args:
        token_sums: `TokenSums.sums`.
        largest: largest finite |z|, a scalar.
        weights: sequence weights relative to on-policy, (bs,).
        lengths: valid tokens of each response, (bs,).
    """

    token_sums: torch.Tensor
    largest: torch.Tensor
    weights: torch.Tensor
    lengths: torch.Tensor

    def as_metrics(self) -> dict[str, float]:
        """The metrics of this module's table: always the same keys, all finite, one device-to-host transfer."""
        valid = (self.lengths > 0) & torch.isfinite(self.weights)
        weight = torch.where(valid, self.weights, 0.0)
        used = valid.sum()
        mean_weight = weight.sum() / used.clamp(min=1)
        sequences = [
            (self.lengths > 0).sum(),
            used,
            mean_weight,
            torch.where(valid, weight - mean_weight, 0.0).square().sum(),
            torch.where(valid, self.weights, torch.inf).amin() if len(weight) else weight.new_tensor(torch.inf),
            torch.where(valid, self.weights, -torch.inf).amax() if len(weight) else weight.new_tensor(-torch.inf),
        ]
        vector = torch.cat(
            [self.token_sums.flatten(), self.largest.reshape(1), torch.stack([s.to(weight.dtype) for s in sequences])]
        )
        numbers = vector.tolist()  # the one transfer
        columns = len(_SETS) + 1
        total = {
            (summand, token_set): numbers[row * columns + column]
            for row, summand in enumerate(_SUMMANDS)
            for column, token_set in enumerate(_SETS)
        }
        nonfinite = numbers[columns - 1]
        largest, sequence_count, weight_count, weight_mean, weight_squares, weight_min, weight_max = numbers[-7:]
        weight_variance = weight_squares / max(weight_count, 1.0)

        def mean(summand: str, token_set: str, empty: float) -> float:
            tokens = total["count", token_set]
            return total[summand, token_set] / tokens if tokens else empty

        def share(token_set: str) -> float:
            return total["count", token_set] / total["count", "all"] if total["count", "all"] else 0.0

        return {
            "actor/ppo_kl": -mean("z", "all", 0.0),
            "sspo/slope": mean("slope", "all", 1.0),
            "sspo/slope_positive": mean("slope", "positive", 1.0),
            "sspo/slope_negative": mean("slope", "negative", 1.0),
            "sspo/slope_forward": mean("slope", "forward", 1.0),
            "sspo/slope_corrective": mean("slope", "corrective", 1.0),
            "sspo/share_forward": share("forward"),
            "sspo/share_corrective": share("corrective"),
            "sspo/closed_positive": mean("closed", "positive", 0.0),
            "sspo/closed_negative": mean("closed", "negative", 0.0),
            "sspo/sequence_weight": weight_mean if weight_count else 1.0,
            "sspo/sequence_weight_std": weight_variance**0.5,
            "sspo/sequence_weight_min": weight_min if weight_count else 1.0,
            "sspo/sequence_weight_max": weight_max if weight_count else 1.0,
            "sspo/effective_sample_size": weight_mean**2 / (weight_mean**2 + weight_variance) if weight_mean else 1.0,
            "sspo/abs_log_ratio": mean("abs_z", "all", 0.0),
            "sspo/abs_log_ratio_max": largest,
            "sspo/tokens": total["count", "all"] + nonfinite,
            "sspo/sequences": sequence_count,
            "sspo/nonfinite_log_ratios": nonfinite,
        }
