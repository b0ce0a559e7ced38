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

import numpy as np
import torch

MOVED = 0.1  # |z| from which a token counts as forward or corrective
CLOSED = 0.1  # slope under which a gate counts as closed

# The sets of valid tokens that slopes are averaged over: the columns of `TokenSums.by_set`.
_SETS = ("all", "positive", "negative", "forward", "corrective")


@dataclass
class TokenSums:
    """Sums over tokens that add up over blocks of rows.

    Args:
        by_set: number of tokens, sum of their slopes and number of closed gates, for each of `_SETS`, (3, 5).
        over_all: sum of z, sum of |z| and number of non-finite z, (3,).
        largest: largest finite |z|, a scalar.
    """

    by_set: torch.Tensor
    over_all: torch.Tensor
    largest: torch.Tensor

    @classmethod
    def zeros(cls, dtype: torch.dtype, device: torch.device) -> "TokenSums":
        by_set = torch.zeros(3, len(_SETS), dtype=dtype, device=device)
        return cls(by_set, by_set.new_zeros(3), by_set.new_zeros(()))

    @classmethod
    def of(
        cls, log_ratio: torch.Tensor, slope: torch.Tensor, advantages: torch.Tensor, valid: torch.Tensor
    ) -> "TokenSums":
        """Sums over a block.

        Sets are kept as 0.0 and 1.0 and written in place: a CPU reads and writes floats five to twenty times
        faster than it selects by a boolean mask.

        Args:
            log_ratio, slope, advantages: (rows, T), log_ratio and advantages 0 at tokens that are not valid.
            valid: 1.0 at valid tokens, 0.0 elsewhere, (rows, T), in the dtype of the others.
        """
        z = torch.nan_to_num(log_ratio, nan=0.0, posinf=0.0, neginf=0.0)
        sets = slope.new_empty(len(_SETS), *slope.shape)
        torch.eq(z, log_ratio, out=sets[0]).mul_(valid)  # finite and valid
        moved = advantages * sets[0]
        torch.gt(moved, 0.0, out=sets[1])
        torch.lt(moved, 0.0, out=sets[2])
        moved.sign_().mul_(z)
        torch.gt(moved, MOVED, out=sets[3])
        torch.lt(moved, -MOVED, out=sets[4])
        summands = slope.new_empty(2, *slope.shape)
        torch.nan_to_num(slope, nan=0.0, out=summands[0])
        torch.lt(summands[0], CLOSED, out=summands[1])
        counts = sets.flatten(1).sum(dim=-1)
        # Both sums over all five sets: one matrix product.
        by_set = torch.cat([counts.unsqueeze(0), summands.flatten(1) @ sets.flatten(1).T])
        z_sum = z.sum()
        z.abs_()
        over_all = torch.stack([z_sum, z.sum(), valid.sum() - counts[0]])
        return cls(by_set, over_all, z.max() if z.numel() else z.new_zeros(()))

    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.by_set, self.over_all, self.largest

    def __iadd__(self, other: "TokenSums") -> "TokenSums":
        self.by_set += other.by_set
        self.over_all += other.over_all
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
        parts = (*self.tokens.parts(), self.weights, self.lengths.to(self.weights.dtype))
        numbers = torch.cat([part.flatten() for part in parts]).cpu().double().numpy()  # the one transfer
        by_set, over_all, (largest,), weights, lengths = np.split(
            numbers, np.cumsum([part.numel() for part in parts[:-1]])
        )
        counts, slopes, closed = (dict(zip(_SETS, row, strict=True)) for row in by_set.reshape(3, -1).tolist())
        z, abs_z, nonfinite = over_all.tolist()
        weights = weights[(lengths > 0) & np.isfinite(weights)]
        if not len(weights):
            weights = np.ones(1)

        def mean(total: float, token_set: str, empty: float) -> float:
            return total / counts[token_set] if counts[token_set] else empty

        square_mean = float(np.mean(weights * weights))
        return {
            "actor/ppo_kl": -mean(z, "all", 0.0),
            "sspo/slope": mean(slopes["all"], "all", 1.0),
            "sspo/slope_positive": mean(slopes["positive"], "positive", 1.0),
            "sspo/slope_negative": mean(slopes["negative"], "negative", 1.0),
            "sspo/slope_forward": mean(slopes["forward"], "forward", 1.0),
            "sspo/slope_corrective": mean(slopes["corrective"], "corrective", 1.0),
            "sspo/share_forward": mean(counts["forward"], "all", 0.0),
            "sspo/share_corrective": mean(counts["corrective"], "all", 0.0),
            "sspo/closed_positive": mean(closed["positive"], "positive", 0.0),
            "sspo/closed_negative": mean(closed["negative"], "negative", 0.0),
            "sspo/sequence_weight": float(weights.mean()),
            "sspo/sequence_weight_std": float(weights.std()),
            "sspo/sequence_weight_min": float(weights.min()),
            "sspo/sequence_weight_max": float(weights.max()),
            "sspo/effective_sample_size": float(weights.mean()) ** 2 / square_mean if square_mean else 1.0,
            "sspo/abs_log_ratio": mean(abs_z, "all", 0.0),
            "sspo/abs_log_ratio_max": float(largest),
            "sspo/tokens": counts["all"] + nonfinite,
            "sspo/sequences": float((lengths > 0).sum()),
            "sspo/nonfinite_log_ratios": nonfinite,
        }
