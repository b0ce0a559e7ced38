"""The soft gates of SSPO, which replace PPO's clip on a token's importance ratio.

All gates come from four odd, bounded, increasing shapes G with G(0) = 0 and G'(0) = 1. With z = log r the
log-ratio of a token and tau its temperature:

* log domain:    log f = G(tau z) / tau,                       kappa = G'(tau z)
* ratio domain:  f = f(1) + G(tau (r - 1)) / tau,              kappa = r f'(r) / f(r),  f' = G'(tau (r - 1))

kappa = d log f / dz is the slope: the fraction of a token's policy gradient that the gate lets through. On policy,
f(1) = kappa(0) = 1, and the gradient is the plain policy gradient. The exception is the sigmoid in the ratio domain,
SAPO's own gate (4 / tau) sigma(tau (r - 1)): it has f(1) = 2 / tau and kappa(0) = tau / 2. Their product is 1, so the
gradient is the same.

Sources: gates on token ratios inside a geometric mean, SSPO arXiv:2602.19327; sigmoid, SAPO arXiv:2511.20347;
the other families, arXiv:2602.19345v2. `side="forward"` and `level="sequence"` are our own extensions.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F

SHAPES = ("arctan", "sigmoid", "erf", "softsign")
DOMAINS = ("log", "ratio")
SIDES = ("both", "forward")
LEVELS = ("token", "sequence")


@dataclass(frozen=True)
class Gate:
    """A gate with its temperatures. The defaults are the preset v3.

    The preset's gate, the arctan of the log-ratio, is restated by third parties. Its temperatures are our choice: the
    best of arXiv:2602.19345v2 for SAPO gates.

    Args:
        shape: one of `SHAPES`.
        domain: "log" gates the log-ratio, "ratio" gates the ratio.
        tau_pos: temperature of tokens with a positive advantage, finite and > 0. A larger one closes the gate earlier.
        tau_neg: temperature of all other tokens.
        side: "both" is the papers' gate. "forward" (our extension) applies the slope only to tokens whose ratio
            already moved the way the advantage pushes, sgn(A) z > 0; the others have slope 1.
        level: "token" is the papers' gate, on each token's own log-ratio. "sequence" (our extension) uses the mean
            log-ratio of the response, as GSPO does, for each of its tokens.

    Raises:
        ValueError: on any other value; the message names what is allowed.
    """

    shape: str = "arctan"
    domain: str = "log"
    tau_pos: float = 10.0
    tau_neg: float = 12.0
    side: str = "both"
    level: str = "token"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("gate", self.shape, SHAPES),
            ("gate_domain", self.domain, DOMAINS),
            ("gate_side", self.side, SIDES),
            ("gate_level", self.level, LEVELS),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(allowed)}")
        for name, tau in (("tau_pos", self.tau_pos), ("tau_neg", self.tau_neg)):
            number = isinstance(tau, int | float) and not isinstance(tau, bool)
            if not number or not 0 < tau <= sys.float_info.max:
                raise ValueError(f"{name}={tau!r} must be a finite number > 0 (the papers use 1 to 12)")
        if self.side == "forward" and self.is_sapo:
            raise ValueError(
                "gate_side='forward' needs a gate with f(1) = 1, and the sigmoid in the ratio domain has "
                "f(1) = 2 / tau: use gate_domain='log', another gate, or gate_side='both'"
            )

    @classmethod
    def of_policy_loss(cls, policy_loss: Mapping[str, Any]) -> "Gate":
        """The gate of a `policy_loss` configuration. Missing settings take their defaults."""
        names = {"shape": "gate", "domain": "gate_domain", "side": "gate_side", "level": "gate_level"}
        settings = {field.name: policy_loss.get(names.get(field.name, field.name)) for field in fields(cls)}
        return cls(**{name: value for name, value in settings.items() if value is not None})

    @property
    def is_sapo(self) -> bool:
        """Whether this is SAPO's own gate, the only one with f(1) != 1."""
        return self.shape == "sigmoid" and self.domain == "ratio"

    def on_policy_value(self, tau: torch.Tensor) -> torch.Tensor:
        """f(1), the gate's value on policy, for each temperature in `tau`."""
        return 2.0 / tau if self.is_sapo else torch.ones_like(tau)

    def on_policy_slope(self, tau: torch.Tensor) -> torch.Tensor:
        """kappa(0), the gate's slope on policy, for each temperature in `tau`."""
        return tau / 2.0 if self.is_sapo else torch.ones_like(tau)

    def log_value_and_slope(self, log_ratio: torch.Tensor, tau: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """log f and kappa of the two-sided gate, both in closed form.

        Args:
            log_ratio: z, any shape, float32 or float64. NaN stays NaN; +-inf saturates.
            tau: temperatures, broadcastable to `log_ratio`.

        Returns:
            (log f, kappa), each of the shape and dtype of `log_ratio`.
        """
        if self.domain == "log":
            value, slope = _SHAPE_FUNCTIONS[self.shape](tau * log_ratio)
            return value.div_(tau), slope
        deviation = torch.expm1(_representable(log_ratio))  # r - 1
        if self.is_sapo:
            u = tau * deviation
            return F.logsigmoid(u) + torch.log(4.0 / tau), tau * (1.0 + deviation) * torch.sigmoid(-u)
        value, slope = _SHAPE_FUNCTIONS[self.shape](tau * deviation)
        # |G(u)| <= |u| gives f >= r for r < 1. Rounding must not break this, or log f is lost for tiny tau.
        f_minus_1 = torch.maximum(value.div_(tau), deviation.clamp(max=0.0))
        slope = slope.mul_(deviation.add_(1.0)).div_(f_minus_1 + 1.0)
        return f_minus_1.log1p_(), slope


def _representable(log_ratio: torch.Tensor) -> torch.Tensor:
    """Clamps z so that r - 1 > -1 and r^2 is finite. Every gate saturates long before. NaN stays NaN."""
    info = torch.finfo(log_ratio.dtype)
    return log_ratio.clamp(min=math.log(info.eps), max=0.45 * math.log(info.max))


# Each shape returns G(u) and G'(u) and overwrites u: on a CPU, memory traffic is most of the cost.


def _arctan(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    value = torch.atan(u)
    return value, u.mul_(u).add_(1.0).reciprocal_()


def _sigmoid(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    t = u.mul_(0.5).tanh_()
    return 2.0 * t, t.mul_(t).neg_().add_(1.0)


def _erf(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    value = torch.erf(u * math.sqrt(0.5)).mul_(math.sqrt(math.pi / 2))
    return value, u.mul_(u).mul_(-0.5).exp_()


def _softsign(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    limit = 0.1 * math.sqrt(torch.finfo(u.dtype).max)
    u = u.clamp_(-limit, limit)  # u * u stays finite, and +-inf gives +-1
    inverse = (u * u).add_(1.0).rsqrt_()
    return u.mul_(inverse), inverse * inverse * inverse


# G and G' of each shape.
_SHAPE_FUNCTIONS = {"arctan": _arctan, "sigmoid": _sigmoid, "erf": _erf, "softsign": _softsign}
