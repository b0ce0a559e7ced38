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

#: verl reports only the first error. If it is about one of these, our finding says more.
SAID_BETTER = ("rollout", "micro_batch_size", "sampling")


def configuration_findings(config: DictConfig) -> list[Finding]:
    """Everything that can be checked in a composed configuration of main_ppo.

    Args:
        config: as `verl_sspo.compose.compose_config` returns it, or as main_ppo receives it.
    """
    found = schema_findings(config)
    if any(finding.check in ("value", "interpolation") for finding in found):
        return found  # the other checks cannot compute with these
    # Resolved once here; otherwise each access would resolve its references again.
    resolved = cast("DictConfig", OmegaConf.create(OmegaConf.to_container(config, resolve=True)))
    found += [*rule_findings(resolved), *interpreter_findings(config)]
    errors = [finding for finding in found if finding.severity == "error"]
    if any(finding.check in SAID_BETTER for finding in errors):
        return found
    return [*found, *(each for each in _rejected(resolved) if not any(one.message in each.message for one in errors))]


def _rejected(config: DictConfig) -> Iterator[Finding]:
    """Does what driver and workers do first: make dataclasses, then verl's own validation. Changes `config`."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    # These need the critic's model and vLLM, which this machine may not have.
    config.critic.model.pop("_target_", None)
    config.actor_rollout_ref.model.lora_rank = 0
    if config.actor_rollout_ref.model.get("lora"):
        config.actor_rollout_ref.model.lora.rank = 0
    rollout = config.actor_rollout_ref.rollout
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            omega_conf_to_dataclass(rollout)
            omega_conf_to_dataclass(rollout.checkpoint_engine)
            validate_config(config, need_reference_policy(config), need_critic(config))
        except Exception as wrong:  # from verl's dataclasses, from Hydra, or an assertion
            message = f"verl rejects the configuration: {' '.join(str(wrong).split())}"
            yield error("verl", message, "correct what it names")
