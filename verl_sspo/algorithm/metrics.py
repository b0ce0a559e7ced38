"""The diagnostics that the SSPO loss logs; `docs/diagnostics.md` explains each in one line.

z is the log-ratio log_prob - old_log_prob of a token, A its advantage. The slope of a token is kappa(z) / kappa(0):
the fraction of its on-policy gradient that the gate lets through. 1 - slope is its lost gradient. A forward token has
moved the way its advantage pushes, sgn(A) z > 0; a corrective token has moved against it, sgn(A) z < 0. The weight of
a response is S_i / f(1), the geometric mean of its gates, 1 on policy.

verl averages the metrics of a loss over micro-batches, ranks and updates, whatever their sizes. Every diagnostic here
is a sum over tokens divided by the tokens of the whole mini-batch. So it is returned as one number per response, and
their mean over the mini-batch is the diagnostic, however the mini-batch is split. A token that is left out, by rollout
weight 0 or by verl's rejection, stays in the denominator and adds 0 to the sums.

A response with a NaN or an infinity among its inputs adds 0 to all diagnostics except `sspo/nonfinite`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from verl_sspo.algorithm.nonfinite import unusable

MOVED = 0.1  # |z| beyond which a token counts as moved
FAR = 1.0  # |z| beyond which a log-ratio counts as far off: a factor of e in probability

# The sums per response that `sweep` returns before `SUMS`: the tokens in `response_mask`, the tokens that take part,
# and over the latter A, log f, log f on policy and the logarithm of the rollout weight.
TOTALS = ("valid", "tokens", "advantages", "log_gates", "log_gates_on_policy", "log_rollout_weights")

# The sums over the tokens of a response that `token_sums` returns, in this order.
SUMS = (
    "lost",
    "actor/ppo_kl",
    "sspo/abs_log_ratio",
    "sspo/lost_forward",
    "sspo/lost_corrective",
    "sspo/lost_positive",
    "sspo/lost_negative",
    "sspo/moved_forward",
    "sspo/moved_corrective",
    "sspo/far_off",
)


def token_sums(z: torch.Tensor, toward: torch.Tensor, slope: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Sums over the tokens of each response, (rows, len(SUMS)).

    Args:
        z, toward, slope, advantages: (rows, T); 0, 0, 1 and 0 at tokens that take no part. `toward` is sgn(A) z.
            `z` and `slope` are overwritten.
    """
    lost = slope.neg_().add_(1.0)
    sums = {"lost": lost.sum(dim=-1), "actor/ppo_kl": -z.sum(dim=-1)}
    distance = z.abs_()
    sums["sspo/abs_log_ratio"] = distance.sum(dim=-1)
    # A set of tokens is a tensor of 1.0 and 0.0: a CPU multiplies floats several times faster than it selects by a
    # boolean mask.
    members = torch.empty_like(z)
    for name, compare, tensor in (
        ("sspo/lost_positive", torch.gt, advantages),
        ("sspo/lost_negative", torch.lt, advantages),
        ("sspo/lost_forward", torch.gt, toward),
        ("sspo/lost_corrective", torch.lt, toward),
    ):
        sums[name] = compare(tensor, 0.0, out=members).mul_(lost).sum(dim=-1)
    for name, compare, tensor, bound in (
        ("sspo/moved_forward", torch.gt, toward, MOVED),
        ("sspo/moved_corrective", torch.lt, toward, -MOVED),
        ("sspo/far_off", torch.gt, distance, FAR),
    ):
        sums[name] = compare(tensor, bound, out=members).sum(dim=-1)
    return torch.stack([sums[name] for name in SUMS], dim=-1)


@dataclass(frozen=True)
class Diagnostics:
    """Inputs and results of the loss for a micro-batch, still on the device.

    Args:
        losses: loss of each response, (bs,).
        log_weights: logarithm of the weight of each response, (bs,).
        token_sums: see `token_sums`, (bs, len(SUMS)).
        lengths: tokens of each response that take part, (bs,).
        valid_lengths: tokens of each response in `response_mask`, those of rollout weight 0 included, (bs,).
        inputs: inputs of the loss by name, each (bs, T).
        response_mask: (bs, T).
        batch_num_tokens: valid tokens of the mini-batch on all ranks. None: this is the whole mini-batch.
        global_batch_size: responses of the mini-batch on all ranks, verl's padding rows included. None: as above.
    """

    losses: torch.Tensor
    log_weights: torch.Tensor
    token_sums: torch.Tensor
    lengths: torch.Tensor
    valid_lengths: torch.Tensor
    inputs: Mapping[str, torch.Tensor]
    response_mask: torch.Tensor
    batch_num_tokens: int | torch.Tensor | None = None
    global_batch_size: int | torch.Tensor | None = None

    @property
    def mask(self) -> torch.Tensor:
        """Tokens that take part, (bs, T), bool."""
        mask, weights = self.response_mask.bool(), self.inputs.get("rollout_is_weights")
        return mask if weights is None else mask & (weights != 0)

    @torch.no_grad()
    def as_metrics(self) -> dict[str, list[float]]:
        """The diagnostics: always the same keys, each with one finite number per response.

        Makes one transfer from the device, and a second one only if a number is not finite.
        """
        others = torch.stack([self.losses, self.log_weights, self.lengths, self.valid_lengths], dim=-1)
        columns = torch.cat([others, self.token_sums], dim=-1).T.tolist()
        _, log_weights, lengths, valid_lengths, *sums = columns
        by_token = dict(zip(SUMS, sums, strict=True))
        by_token["sspo/slope"] = [n - x for n, x in zip(lengths, by_token.pop("lost"), strict=True)]
        by_token["sspo/sequence_weight"] = [n * math.exp(x) for n, x in zip(lengths, log_weights, strict=True)]
        by_token["sspo/abs_log_weight"] = [n * abs(x) for n, x in zip(lengths, log_weights, strict=True)]
        by_token["sspo/nonfinite"] = [0.0] * len(lengths)
        usable = [all(map(math.isfinite, response)) for response in zip(*columns, strict=True)]
        if not all(usable):
            for values in by_token.values():
                values[:] = [x if good else 0.0 for x, good in zip(values, usable, strict=True)]
            bad = torch.stack([unusable(*each) for each in self.inputs.items()]).any(dim=0)
            by_token["sspo/nonfinite"] = (bad & self.mask).sum(dim=-1).tolist()
        left_out = [n - m for n, m in zip(valid_lengths, lengths, strict=True)]
        return {
            **{key: self._per_response(values, lengths) for key, values in by_token.items()},
            "sspo/tokens_left_out": self._per_response(left_out, valid_lengths),
            "sspo/responses_left_out": [float(n > m == 0) for n, m in zip(valid_lengths, lengths, strict=True)],
        }

    def _per_response(self, sums: list[float], lengths: list[float]) -> list[float]:
        """Scales sums over tokens so that their mean over responses is the mean over the tokens of the mini-batch."""
        tokens = sum(lengths) if self.batch_num_tokens is None else float(self.batch_num_tokens)
        responses = len(lengths) if self.global_batch_size is None else float(self.global_batch_size)
        return [value * responses / max(tokens, 1.0) for value in sums]
