"""The SSPO loss as a plain formula with autograd; the tests compare `loss` with it.

Written from the papers alone (SSPO arXiv:2602.19327; gate families arXiv:2602.19345v2): it shares the settings with
`verl_sspo.algorithm.gates`, but no formula.
"""

import math

import torch

from verl_sspo.algorithm.gates import Gate

# log f as a function of the log-ratio z and the temperature t.
LOG_GATES = {
    ("arctan", "log"): lambda z, t: torch.atan(t * z) / t,
    ("sigmoid", "log"): lambda z, t: 2 / t * torch.tanh(t * z / 2),
    ("erf", "log"): lambda z, t: math.sqrt(math.pi / 2) / t * torch.erf(t * z / math.sqrt(2)),
    ("softsign", "log"): lambda z, t: z / torch.sqrt(1 + t**2 * z**2),
    ("sigmoid", "ratio"): lambda z, t: torch.log(4 / t * torch.sigmoid(t * (z.exp() - 1))),
    ("arctan", "ratio"): lambda z, t: torch.log(1 + torch.atan(t * (z.exp() - 1)) / t),
    ("erf", "ratio"): lambda z, t: torch.log(
        1 + math.sqrt(math.pi / 2) / t * torch.erf(t * (z.exp() - 1) / math.sqrt(2))
    ),
    ("softsign", "ratio"): lambda z, t: torch.log(1 + (z.exp() - 1) / torch.sqrt(1 + t**2 * (z.exp() - 1) ** 2)),
}


def sspo_loss_matrix(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    gate: Gate,
    rollout_is_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes the token losses of the token-wise form; differentiable.

    Aggregated with verl's `agg_loss(..., "seq-mean-token-mean")` this is the SSPO loss, if the mask given to
    `agg_loss` leaves out the tokens of rollout weight 0 as well. Only for finite log-ratios of moderate size: there is
    no protection against overflow.

    Args:
        log_prob, old_log_prob, advantages, response_mask, rollout_is_weights: as in `sspo_loss`,
            (bs, response_length), float32 or float64.
        gate: the gate and its temperatures.

    Returns:
        (bs, response_length), 0 at tokens that take no part.
    """
    mask = response_mask.bool()
    if rollout_is_weights is not None:
        mask = mask & (rollout_is_weights != 0)
    z = torch.where(mask, log_prob - old_log_prob, 0.0)
    lengths = mask.sum(dim=-1, keepdim=True).clamp(min=1)
    if gate.level == "sequence":  # value of the mean, gradient of the token itself: the form of GSPO-token
        z = torch.where(mask, z.sum(dim=-1, keepdim=True).detach() / lengths + z - z.detach(), 0.0)
    a = torch.where(mask, advantages, 0.0)
    tau = torch.where(a > 0, torch.full_like(z, gate.tau_pos), torch.full_like(z, gate.tau_neg))
    log_f = LOG_GATES[gate.shape, gate.domain](z, tau)
    if gate.side == "forward":
        log_f = torch.where(torch.sign(a) * z > 0, log_f, log_f.detach() + z - z.detach())
    weight = torch.exp(torch.where(mask, log_f, 0.0).sum(dim=-1, keepdim=True) / lengths)
    if rollout_is_weights is not None:
        log_w = torch.where(mask, rollout_is_weights.log(), 0.0)
        weight = weight * torch.exp(log_w.sum(dim=-1, keepdim=True) / lengths)
    return torch.where(mask, -a * weight.detach() * torch.exp(log_f - log_f.detach()), 0.0)
