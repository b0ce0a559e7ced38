"""Calls the registered policy losses outside a trainer, with the settings of recipes/algo."""

from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

import torch
import verl  # noqa: F401  loads the plugin
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import ActorConfig

from verl_sspo.compose import RECIPES, compose_config

#: The objectives to compare: title -> Hydra overrides of the quickstart.
COMPARED = {
    "GRPO": ["algo=grpo"],
    "GSPO": ["algo=gspo"],
    "GMPO": ["algo=gmpo"],
    "SAPO": ["algo=sapo"],
    "SSPO": ["algo=sspo"],
    "SSPO, forward": ["algo=sspo_forward"],
    "SSPO, sequence": ["algo=sspo_sequence"],
    "SSPO v1": ["algo=sspo_v1"],
}


def actor_config(overrides: Sequence[str]) -> ActorConfig:
    """The actor's configuration, as in verl's workers, for the quickstart with these Hydra overrides."""
    return omega_conf_to_dataclass(compose_config("quickstart", overrides, RECIPES).actor_rollout_ref.actor)


def with_policy_loss(config: ActorConfig, **settings: Any) -> ActorConfig:
    """The same configuration with other settings of its policy loss, e.g. `gate="erf"`."""
    return replace(config, policy_loss=replace(config.policy_loss, **settings))


def policy_loss(
    config: ActorConfig,
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
) -> torch.Tensor:
    """The loss that `config` names, called the way verl's actor calls it; its metrics are dropped.

    Args:
        config: the actor's configuration.
        log_prob, old_log_prob, advantages: (bs, response_length), floating point.
        response_mask: (bs, response_length), bool.
    """
    # On its first call `sspo` prints its settings, which belong in the log of a training.
    with redirect_stdout(None):
        loss, _ = get_policy_loss_fn(config.policy_loss.loss_mode)(
            old_log_prob=old_log_prob,
            log_prob=log_prob,
            advantages=advantages,
            response_mask=response_mask,
            loss_agg_mode=config.loss_agg_mode,
            config=config,
            rollout_is_weights=None,
        )
    return loss


def policy_gradient(
    config: ActorConfig, log_prob: torch.Tensor, old_log_prob: torch.Tensor, advantages: torch.Tensor
) -> torch.Tensor:
    """The ascent direction -dloss / dlog_prob, with all tokens valid; all tensors are (bs, response_length)."""
    leaf = log_prob.detach().clone().requires_grad_()
    mask = torch.ones_like(leaf, dtype=torch.bool)
    return -torch.autograd.grad(policy_loss(config, leaf, old_log_prob, advantages, mask), leaf)[0]
