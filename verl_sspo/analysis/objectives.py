"""The policy losses of recipes/algo as functions of log-probabilities: verl's own and ours, never derived again."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import verl  # noqa: F401  loads the plugin
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import ActorConfig

from verl_sspo.run.compose import RECIPES, compose_config


@dataclass(frozen=True)
class Objective:
    """A policy loss with its settings.

    Args:
        title: name in legends.
        config: the actor's configuration, as verl's workers hold it.
    """

    title: str
    config: ActorConfig

    def gradient(
        self, log_prob: torch.Tensor, old_log_prob: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """The gradient that the optimizer climbs, -dloss / dlog_prob, all (bs, response_length)."""
        leaf = log_prob.detach().clone().requires_grad_()
        loss, _ = get_policy_loss_fn(self.config.policy_loss.loss_mode)(
            old_log_prob=old_log_prob,
            log_prob=leaf,
            advantages=advantages,
            response_mask=mask,
            loss_agg_mode=self.config.loss_agg_mode,
            config=self.config,
            rollout_is_weights=None,
        )
        loss.backward()
        assert leaf.grad is not None
        return -leaf.grad

    def relative_gradient(
        self, log_prob: torch.Tensor, old_log_prob: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """The gradient over what it is on policy: the coefficient of each token's policy gradient, 1 on policy."""
        on_policy = self.gradient(old_log_prob, old_log_prob, advantages, mask)
        return self.gradient(log_prob, old_log_prob, advantages, mask) / on_policy


def objective(title: str, overrides: Sequence[str], recipes: Path = RECIPES) -> Objective:
    """The loss that the quickstart would run with these Hydra overrides, e.g. `["algo=gspo"]`."""
    return Objective(title, _actor_config(tuple(overrides), recipes))


@cache
def _actor_config(overrides: tuple[str, ...], recipes: Path) -> ActorConfig:
    return omega_conf_to_dataclass(compose_config("quickstart", overrides, recipes).actor_rollout_ref.actor)


#: What is compared: title -> Hydra overrides.
COMPARED = {
    "GRPO": ["algo=grpo"],
    "GSPO": ["algo=gspo"],
    "GMPO": ["algo=gmpo"],
    "SAPO": ["algo=sapo"],
    "SSPO": ["algo=sspo"],
    "SSPO, forward": ["algo=sspo_forward"],
}


def with_policy_loss(base: Objective, **settings: Any) -> Objective:
    """The same objective with other settings of its policy loss, e.g. `gate="erf"`."""
    return replace(base, config=replace(base.config, policy_loss=replace(base.config.policy_loss, **settings)))
