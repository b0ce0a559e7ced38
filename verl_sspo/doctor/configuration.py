"""Checks of a composed configuration. They read nothing else: no GPU, no model, no data."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import cast

from omegaconf import DictConfig, OmegaConf

from verl_sspo.doctor.finding import Finding, error
from verl_sspo.doctor.interpreter import interpreter_findings
from verl_sspo.doctor.rules import rule_findings
from verl_sspo.doctor.schema import schema_findings

#: verl stops at its first complaint. Where it would be about one of these, ours says more.
SAID_BETTER = ("rollout", "micro_batch_size", "sampling")


def configuration_findings(config: DictConfig) -> list[Finding]:
    """Everything that a composed configuration of main_ppo reveals about itself.

    Args:
        config: as `verl_sspo.compose.compose_config` returns it, or as main_ppo receives it.
    """
    found = schema_findings(config)
    if any(finding.check in ("value", "interpolation") for finding in found):
        return found  # nothing can be computed from these
    found += [*rule_findings(config), *interpreter_findings(config)]
    errors = [finding for finding in found if finding.severity == "error"]
    if any(finding.check in SAID_BETTER for finding in errors):
        return found
    return [*found, *(each for each in _rejected(config) if not any(one.message in each.message for one in errors))]


def _rejected(config: DictConfig) -> Iterator[Finding]:
    """What driver and workers do first: sections into dataclasses, then verl's own validation."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    copy = cast("DictConfig", OmegaConf.create(OmegaConf.to_container(config, resolve=True)))
    # These two ask for the critic's model and for vLLM, which need not be on the machine that checks.
    copy.critic.model.pop("_target_", None)
    copy.actor_rollout_ref.model.lora_rank = 0
    if copy.actor_rollout_ref.model.get("lora"):
        copy.actor_rollout_ref.model.lora.rank = 0
    rollout = copy.actor_rollout_ref.rollout
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            omega_conf_to_dataclass(rollout)
            omega_conf_to_dataclass(rollout.checkpoint_engine)
            validate_config(copy, need_reference_policy(copy), need_critic(copy))
        except Exception as wrong:  # of its dataclasses, of Hydra, or an assertion
            message = f"verl rejects the configuration: {' '.join(str(wrong).split())}"
            yield error("verl", message, "correct what it names")
