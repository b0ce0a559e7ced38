"""The diagnostics of the SSPO loss: every key that it logs, defined here and nowhere else.

z is the log-ratio log_prob - old_log_prob of a valid token, A its advantage. The slope of a token is
kappa(z) / kappa(0): the share of its on-policy gradient that the gate lets through, 1 on policy. A forward token
has moved the way its advantage pushes (sgn(A) z > 0.1), a corrective token against it (sgn(A) z < -0.1). The
weight of a response is S_i / f(1), the geometric mean of its gates, 1 on policy.

verl logs `sspo/x` as `actor/sspo/x`: averaged over the micro-batches of an update, then over the updates of a step;
of the latter, keys ending in `_min` / `_max` keep the smallest / largest. Averages leave tokens out whose log-ratio or
advantage is not finite; the last line counts them. Where no token is of a kind, its slope is reported as 1 and its
share as 0.

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
| `sspo/nonfinite_log_prob`, `sspo/nonfinite_old_log_prob`, `sspo/nonfinite_advantages`, \
  `sspo/nonfinite_rollout_is_weights` | valid tokens at which this input is NaN or infinite, per micro-batch |
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

MOVED = 0.1  # |z| from which a token counts as forward or corrective
CLOSED = 0.1  # slope under which a gate counts as closed

# What the loss is computed from.
INPUTS = ("log_prob", "old_log_prob", "advantages", "rollout_is_weights")

# What is summed over tokens, in the order of `TokenSums.sums`: side is sgn(A), and a name with `in_` counts or sums
# over the tokens of a kind.
_SUMS = (
    *("z", "abs_z", "slope", "count"),
    *("side", "side_slope", "side_closed"),
    *("abs_side", "abs_side_slope", "abs_side_closed"),
    *("in_forward", "slope_in_forward", "in_corrective", "slope_in_corrective"),
)


@dataclass
class TokenSums:
    """Sums over valid tokens that add up over blocks of rows. Not finite where a log-ratio is not.

    Args:
        sums: of `_SUMS`, (14,).
        largest: largest |z|, a scalar.
    """

    sums: torch.Tensor
    largest: torch.Tensor

    @classmethod
    def of(
        cls, log_ratio: torch.Tensor, slope: torch.Tensor, advantages: torch.Tensor, lengths: torch.Tensor
    ) -> "TokenSums":
        """Sums over a block, whose tensors are overwritten.

        A set of tokens is a tensor of 0.0 and 1.0: a CPU sums products of floats many times faster than it selects by
        a boolean mask. Positive and negative advantages share one pass, over sgn(A) and over its absolute value.

        Args:
            log_ratio, slope, advantages: (rows, T); at tokens that are not valid 0, 1 and 0.
            lengths: valid tokens of each row, (rows,).
        """
        z, slope, side = log_ratio.view(-1), slope.view(-1), advantages.sign_().view(-1)
        count = lengths.sum().to(z.dtype)
        moved = side * z
        members = torch.lt(slope, CLOSED, out=torch.empty_like(slope))
        sums = [z.sum(), z.abs_().sum(), slope.sum() - (z.numel() - count), count]
        sums += [side.sum(), torch.dot(side, slope), torch.dot(side, members)]
        side.abs_()
        sums += [side.sum(), torch.dot(side, slope), torch.dot(side, members)]
        torch.gt(moved, MOVED, out=members)
        sums += [members.sum(), torch.dot(members, slope)]
        torch.lt(moved, -MOVED, out=members)
        sums += [members.sum(), torch.dot(members, slope)]
        return cls(torch.stack(sums), z.amax() if z.numel() else z.new_zeros(()))

    def __iadd__(self, other: "TokenSums") -> "TokenSums":
        self.sums += other.sums
        torch.maximum(self.largest, other.largest, out=self.largest)
        return self


@dataclass(frozen=True)
class Statistics:
    """What the loss saw of a micro-batch, still on the device.

    Args:
        loss: the loss, a scalar.
        tokens: sums over the valid tokens.
        weights: sequence weights relative to on-policy, (bs,).
        lengths: valid tokens of each response, (bs,).
        inputs: what the loss was computed from, by name, each (bs, T): where numbers that are not finite come from.
        mask: valid tokens, (bs, T).
        of_finite_tokens: computes the sums again, over tokens with finite inputs only.
    """

    loss: torch.Tensor
    tokens: TokenSums
    weights: torch.Tensor
    lengths: torch.Tensor
    inputs: Mapping[str, torch.Tensor]
    mask: torch.Tensor
    of_finite_tokens: Callable[[], TokenSums]

    def as_metrics(self) -> dict[str, float]:
        """The metrics of this module's table: always the same keys, all finite, one device-to-host transfer.

        There are more transfers where a number is not finite, to find out where it came from.
        """
        numbers = self._to_host(self.tokens)
        nonfinite = dict.fromkeys(INPUTS, 0.0)
        if not all(map(math.isfinite, numbers[: 1 + len(_SUMS)])):
            counts = torch.stack([(self.mask & ~tensor.isfinite()).sum() for tensor in self.inputs.values()])
            nonfinite |= dict(zip(self.inputs, map(float, counts.tolist()), strict=True))
            numbers = self._to_host(self.of_finite_tokens())
        return _as_metrics(numbers) | {f"sspo/nonfinite_{name}": count for name, count in nonfinite.items()}

    def _to_host(self, tokens: TokenSums) -> list[float]:
        """Loss, `_SUMS`, largest |z|, then weights and lengths of all responses."""
        parts = (self.loss.view(1), tokens.sums, tokens.largest.view(1), self.weights, self.lengths)
        return torch.cat([part.to(tokens.sums.dtype) for part in parts]).tolist()


def _as_metrics(numbers: list[float]) -> dict[str, float]:
    total = dict(zip(("loss", *_SUMS, "largest"), numbers, strict=False))
    per_response = numbers[len(total) :]
    responses = len(per_response) // 2
    lengths = per_response[responses:]
    weights = [w for w, length in zip(per_response, lengths, strict=False) if length and math.isfinite(w)] or [1.0]
    weight_mean = math.fsum(weights) / len(weights)
    weight_variance = math.fsum((w - weight_mean) ** 2 for w in weights) / len(weights)

    def mean(name: str, count: str, empty: float) -> float:
        return total[name] / total[count] if total[count] else empty

    # sgn(A) is 1, -1 or 0, so half the sum and half the difference pick out the positive and the negative tokens.
    for name in ("side", "side_slope", "side_closed"):
        total[f"{name}_positive"] = (total[f"abs_{name}"] + total[name]) / 2
        total[f"{name}_negative"] = (total[f"abs_{name}"] - total[name]) / 2
    square_mean = weight_mean**2 + weight_variance
    return {
        "actor/ppo_kl": -mean("z", "count", 0.0),
        "sspo/slope": mean("slope", "count", 1.0),
        "sspo/slope_positive": mean("side_slope_positive", "side_positive", 1.0),
        "sspo/slope_negative": mean("side_slope_negative", "side_negative", 1.0),
        "sspo/slope_forward": mean("slope_in_forward", "in_forward", 1.0),
        "sspo/slope_corrective": mean("slope_in_corrective", "in_corrective", 1.0),
        "sspo/share_forward": mean("in_forward", "count", 0.0),
        "sspo/share_corrective": mean("in_corrective", "count", 0.0),
        "sspo/closed_positive": mean("side_closed_positive", "side_positive", 0.0),
        "sspo/closed_negative": mean("side_closed_negative", "side_negative", 0.0),
        "sspo/sequence_weight": weight_mean,
        "sspo/sequence_weight_std": math.sqrt(weight_variance),
        "sspo/sequence_weight_min": min(weights),
        "sspo/sequence_weight_max": max(weights),
        "sspo/effective_sample_size": weight_mean**2 / square_mean if square_mean else 1.0,
        "sspo/abs_log_ratio": mean("abs_z", "count", 0.0),
        "sspo/abs_log_ratio_max": total["largest"],
        "sspo/tokens": math.fsum(lengths),
        "sspo/sequences": float(sum(length > 0 for length in lengths)),
    }
