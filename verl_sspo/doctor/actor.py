"""Checks of the actor's configuration: what the loss itself can see at its first call. Light imports only."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch

from verl_sspo.algorithm.gates import Gate
from verl_sspo.doctor.finding import Finding

SSPO_TARGET = "verl_sspo.config.SSPOPolicyLossConfig"
#: verl's defaults of what SSPO does not read.
UNREAD = {
    "clip_ratio": 0.2,
    "clip_ratio_low": 0.2,
    "clip_ratio_high": 0.2,
    "clip_ratio_c": 3.0,
    "tau_pos": 1.0,
    "tau_neg": 1.05,
}
#: Losses whose objective is a mean over responses. sapo and geo_mean aggregate so whatever is configured.
SEQUENCE_LOSSES = ("sspo", "gspo", "sapo", "geo_mean")
#: A gate that passes less than this at a log-ratio of 0.05 lets next to nothing through.
SMALLEST_SLOPE = 0.1


def _has_gate(policy_loss: Any) -> bool:
    """Whether this is, or will become, an SSPOPolicyLossConfig and not verl's own class."""
    return hasattr(type(policy_loss), "gate_side") or policy_loss.get("_target_") == SSPO_TARGET


def actor_findings(actor: Any) -> list[Finding]:
    """Findings about `actor_rollout_ref.actor`, verl's dataclass or the composed DictConfig."""
    return [*_loss_findings(actor), *_gate_findings(actor)]


def _loss_findings(actor: Any) -> Iterator[Finding]:
    loss_mode = actor.get("policy_loss").get("loss_mode")
    aggregation = actor.get("loss_agg_mode")
    if loss_mode in SEQUENCE_LOSSES and aggregation != "seq-mean-token-mean":
        forced = loss_mode in ("sapo", "geo_mean")
        yield Finding(
            "warning",
            "aggregation",
            f"loss_agg_mode={aggregation}, but {loss_mode} is a mean over responses"
            + ("; the loss does so anyway, entropy and KL terms would not" if forced else ""),
            "set actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean",
        )
    if loss_mode != "sspo":
        return
    if actor.get("use_kl_loss"):
        yield Finding(
            "warning",
            "kl",
            "use_kl_loss=true adds a token-wise KL term that SSPO's objective does not have",
            "set actor_rollout_ref.actor.use_kl_loss=false",
        )
    unread = [f"{name}={actor.get(name)}" for name, default in UNREAD.items() if actor.get(name, default) != default]
    if unread:
        yield Finding(
            "warning",
            "unread",
            f"SSPO does not read actor.{', actor.'.join(unread)}: it clips nothing, and its temperatures are "
            "policy_loss.tau_pos and policy_loss.tau_neg",
            "remove them, or set the temperatures under actor_rollout_ref.actor.policy_loss",
        )
    megatron = actor.get("megatron")
    parallel = 1 if megatron is None else megatron.get("context_parallel_size", 1)
    if parallel > 1 and aggregation == "seq-mean-token-mean" and version("verl").startswith("0.9."):
        yield Finding(
            "error",
            "context_parallel",
            f"Megatron context_parallel_size={parallel} with seq-mean-token-mean raises in verl {version('verl')} "
            "(verl issue 7914)",
            "set actor_rollout_ref.actor.megatron.context_parallel_size=1, or use a verl with the fix",
        )


def _gate_findings(actor: Any) -> Iterator[Finding]:
    policy_loss = actor.get("policy_loss")
    loss_mode = policy_loss.get("loss_mode")
    has_gate = _has_gate(policy_loss)
    if loss_mode != "sspo":
        if has_gate:
            yield Finding(
                "warning",
                "gate_unused",
                f"policy_loss has the gate of SSPO, but loss_mode={loss_mode} does not read it",
                "set actor_rollout_ref.actor.policy_loss.loss_mode=sspo, or take another algo=",
            )
        return
    if not has_gate:
        yield Finding(
            "warning",
            "target",
            "policy_loss is verl's own class: gate and temperatures are those of the preset v3 and cannot be changed",
            f"to change them set actor_rollout_ref.actor.policy_loss._target_={SSPO_TARGET}",
        )
    try:
        gate = Gate.of_policy_loss(actor.get("policy_loss"))
    except ValueError as error:
        yield Finding("error", "gate", str(error), "correct it under actor_rollout_ref.actor.policy_loss")
        return
    for name, tau in (("tau_pos", gate.tau_pos), ("tau_neg", gate.tau_neg)):
        temperature = torch.tensor(tau, dtype=torch.float64)
        _, slope = gate.log_value_and_slope(torch.tensor([-0.05, 0.05], dtype=torch.float64), temperature)
        share = float((slope / gate.on_policy_slope(temperature)).max())
        if share < SMALLEST_SLOPE:
            yield Finding(
                "warning",
                "temperature",
                f"{name}={tau:g} is so narrow a gate that a token whose probability moved by 5 % keeps {share:.1%} of "
                "its gradient",
                "the papers use 1 to 12",
            )
