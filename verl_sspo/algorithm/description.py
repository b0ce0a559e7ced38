"""Describes the effective settings of SSPO, printed once in the log of the actor."""

import math
from importlib.metadata import version
from typing import Any

import torch

from verl_sspo.algorithm.gates import Gate


def half_width(gate: Gate, tau: float) -> float:
    """The log-ratio z > 0 at which the slope is half of that on policy; inf if it is beyond 20."""
    z = torch.logspace(-6, math.log10(20.0), 20_000, dtype=torch.float64)
    temperature = torch.tensor(tau, dtype=torch.float64)
    _, slope = gate.log_value_and_slope(z, temperature)
    below = (slope < 0.5 * gate.on_policy_slope(temperature)).nonzero()
    return float(z[below[0]]) if len(below) else math.inf


def describe(actor: Any) -> str:
    """The effective settings of SSPO as one readable block.

    Args:
        actor: verl's actor configuration, the dataclass or the composed DictConfig.

    Raises:
        ValueError: on settings that `verl_sspo.algorithm.gates.Gate` refuses.
    """
    gate = Gate.of_policy_loss(actor.get("policy_loss"))
    domain = ("mean " if gate.level == "sequence" else "") + ("log-ratio" if gate.domain == "log" else "ratio")
    side = "" if gate.side == "both" else ", forward side only (our extension)"
    positive, negative = half_width(gate, gate.tau_pos), half_width(gate, gate.tau_neg)
    lines = [
        f"SSPO (verl_sspo {version('verl-sspo')}, verl {version('verl')})",
        f"  gate         {gate.shape} of the {domain}{side}",
        f"  temperature  {gate.tau_pos:g} where A > 0: half of a token's gradient passes at log-ratio {positive:.3g}",
        f"               {gate.tau_neg:g} elsewhere: at {negative:.3g}",
        f"  aggregation  {actor.get('loss_agg_mode')}",
        f"  other terms  entropy bonus {actor.get('entropy_coeff', 0):g}, KL loss {_kl(actor)}",
    ]
    return "\n".join(lines)


def _kl(actor: Any) -> str:
    return f"{actor.get('kl_loss_coef'):g}" if actor.get("use_kl_loss") else "off"
