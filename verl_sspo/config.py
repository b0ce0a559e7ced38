"""SSPO's configuration in verl.

`SSPOPolicyLossConfig` reaches the loss on the FSDP and the Megatron actor through
`actor_rollout_ref.actor.policy_loss._target_=verl_sspo.config.SSPOPolicyLossConfig`;
`SSPOAdvantageConfig` is read from `algorithm.sspo`.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from verl_sspo.algorithm.gates import Gate
from verl_sspo.algorithm.loss import KERNELS


def _check_switch(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be true or false")


@dataclass(frozen=True)
class SSPOAdvantageConfig:
    """Options of the advantage estimator `sspo`, read from `algorithm.sspo`.

    Args:
        baseline: "mean" subtracts the mean reward of the group (GRPO), "leave_one_out" that of the others.
        std_floor: smallest standard deviation to divide a group by, >= 0; 0 is GRPO.
        stop_on_nonfinite: stop the run at the first NaN or infinite reward, instead of warning.

    Raises:
        ValueError: on an unknown key or value; the message names what is allowed.
    """

    baseline: str = "mean"
    std_floor: float = 0.0
    stop_on_nonfinite: bool = False

    def __post_init__(self) -> None:
        _check_switch("algorithm.sspo.stop_on_nonfinite", self.stop_on_nonfinite)
        if self.baseline not in ("mean", "leave_one_out"):
            raise ValueError(f"algorithm.sspo.baseline={self.baseline!r} is unknown: use mean or leave_one_out")
        number = isinstance(self.std_floor, int | float) and not isinstance(self.std_floor, bool)
        if not number or not 0 <= self.std_floor <= sys.float_info.max:
            raise ValueError(f"algorithm.sspo.std_floor={self.std_floor!r} must be a finite number >= 0")

    @classmethod
    def from_algorithm(cls, algorithm: Mapping[str, Any] | None) -> "SSPOAdvantageConfig":
        """Reads `algorithm.sspo`, which may be absent."""
        options = None if algorithm is None else algorithm.get("sspo")
        if options is None:
            return cls()
        allowed = [field.name for field in fields(cls)]
        if not isinstance(options, Mapping):
            raise ValueError(f"algorithm.sspo={options!r} must be a section with keys from {allowed}")
        if unknown := sorted(str(key) for key in options if key not in allowed):
            raise ValueError(f"algorithm.sspo has unknown keys {unknown}: use {allowed}")
        return cls(**options)


# Imported only here: importing verl loads our plugin, which needs the class above.
from verl.workers.config import PolicyLossConfig  # noqa: E402


@dataclass
class SSPOPolicyLossConfig(PolicyLossConfig):
    """verl's policy-loss configuration with the gate of SSPO. The defaults are the preset `v3`.

    Args:
        gate, gate_domain, tau_pos, tau_neg, gate_side, gate_level: see `verl_sspo.algorithm.gates.Gate`.
        kernel: "auto" uses a Triton kernel on a GPU and PyTorch elsewhere; "torch" and "triton" force one of them.
        stop_on_nonfinite: stop the run at the first NaN or infinity in the inputs of the loss, instead of warning.

    Raises:
        ValueError: on an unknown kernel, or on settings that `Gate` rejects; the message names what is allowed.
    """

    gate: str = "arctan"
    gate_domain: str = "log"
    tau_pos: float = 10.0
    tau_neg: float = 12.0
    gate_side: str = "both"
    gate_level: str = "token"
    kernel: str = "auto"
    stop_on_nonfinite: bool = False

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel={self.kernel!r} is unknown: use one of {', '.join(KERNELS)}")
        _check_switch("policy_loss.stop_on_nonfinite", self.stop_on_nonfinite)
        Gate(self.gate, self.gate_domain, self.tau_pos, self.tau_neg, self.gate_side, self.gate_level)
