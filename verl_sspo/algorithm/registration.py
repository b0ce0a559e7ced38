"""SSPO as verl calls it: thin adapters from verl's conventions to `loss` and `advantage`, registered at import."""

import itertools
import math
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss
from verl.workers.config import ActorConfig

from verl_sspo.algorithm import nonfinite
from verl_sspo.algorithm.advantage import group_relative_advantages
from verl_sspo.algorithm.description import describe
from verl_sspo.algorithm.gates import Gate
from verl_sspo.algorithm.loss import sspo_loss
from verl_sspo.config import SSPOAdvantageConfig

_announced = False
# Calls of the loss and of the estimator in this process: verl tells neither of them the step.
_loss_calls = itertools.count(1)
_estimator_calls = itertools.count(1)


def _announce(config: ActorConfig) -> None:
    """Prints the effective settings, once, in the log of the actor's first rank."""
    global _announced
    if not _announced and (not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0):
        print(describe(config), flush=True)
    _announced = True


@register_policy_loss("sspo")
def compute_policy_loss_sspo(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: DictConfig | ActorConfig | None = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """SSPO's policy loss (arXiv:2602.19327) in verl's calling convention; computed by `sspo_loss`.

    Args:
        old_log_prob: log-probabilities of the policy before the update, (bs, response_length).
        log_prob: log-probabilities of the current policy, (bs, response_length).
        advantages: (bs, response_length).
        response_mask: valid tokens, (bs, response_length).
        loss_agg_mode: verl's aggregation; SSPO is "seq-mean-token-mean".
        config: the actor's configuration: `policy_loss` for the gate, `global_batch_info` for the aggregation.
        rollout_is_weights: rollout-correction weights, (bs, response_length), or None.

    Returns:
        (loss, metrics): a scalar, and the metrics that `verl_sspo.algorithm.metrics` defines.

    Raises:
        ValueError: without an ActorConfig, or on shapes or a mode that `sspo_loss` excludes.
        FloatingPointError: an input is not finite at a valid token, and `policy_loss.stop_on_nonfinite` is set.
    """
    if not isinstance(config, ActorConfig):
        raise ValueError(f"the loss `sspo` needs verl's ActorConfig as `config`, got {type(config).__name__}")
    _announce(config)
    loss, statistics = sspo_loss(
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        Gate.of_policy_loss(config.policy_loss),
        loss_agg_mode=loss_agg_mode,
        rollout_is_weights=rollout_is_weights,
        use_torch_compile=config.use_torch_compile,
        **config.global_batch_info,
    )
    metrics = statistics.as_metrics()
    call = next(_loss_calls)
    if bad := {name: tensor for name, tensor in statistics.inputs.items() if metrics[f"sspo/nonfinite_{name}"]}:
        nonfinite.report(
            bad,
            statistics.mask,
            call,
            "A NaN makes the loss NaN, and verl's FSDP actor then skips the update; an infinite log-ratio saturates "
            "its gate. The metrics actor/sspo/nonfinite_* count them at each step.",
            stop=config.policy_loss.get("stop_on_nonfinite", False),
        )
    return loss, metrics


@register_adv_est("sspo")
def compute_sspo_outcome_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    config: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Group-relative advantages in verl's calling convention; `group_relative_advantages` computes them.

    Args:
        token_level_rewards: (bs, response_length); the reward of a response is their sum.
        response_mask: valid tokens, (bs, response_length).
        index: the prompt of each response (uid), (bs,).
        config: verl's `algorithm` section: `norm_adv_by_std_in_grpo`, and `sspo` for `SSPOAdvantageConfig`.
        **kwargs: what verl passes to other estimators.

    Returns:
        (advantages, returns): the same tensor, (bs, response_length), 0 outside of `response_mask`.

    Raises:
        ValueError: where `index` does not name a prompt for every response, or on bad options.
        FloatingPointError: a reward is not finite, and `algorithm.sspo.stop_on_nonfinite` is set.
    """
    if len(index) != len(token_level_rewards):
        raise ValueError(f"index names {len(index)} prompts for {len(token_level_rewards)} responses")
    options = SSPOAdvantageConfig.from_algorithm(config)
    # pandas.factorize is hardly faster, and importing pandas takes 6 % of `import verl` in every process of a run.
    numbers: dict[Any, int] = {}
    groups = torch.tensor([numbers.setdefault(uid, len(numbers)) for uid in index], dtype=torch.int64)
    with torch.no_grad():
        rewards = token_level_rewards.sum(dim=-1)
        call = next(_estimator_calls)
        # One number to the host: a sum is finite only if all are.
        if not math.isfinite(rewards.sum()) and not rewards.isfinite().all():
            nonfinite.report(
                {"rewards": rewards},
                torch.ones_like(rewards, dtype=torch.bool),
                call,
                "The advantages of their groups are NaN, and updates with them are skipped: see the reward function.",
                stop=options.stop_on_nonfinite,
            )
        advantages = group_relative_advantages(
            rewards,
            groups.to(token_level_rewards.device),
            normalize_by_std=True if config is None else config.get("norm_adv_by_std_in_grpo", True),
            baseline=options.baseline,
            std_floor=options.std_floor,
        )
        # In place: a product with an integer mask would convert a second copy of it, and fresh memory is what costs.
        advantages = response_mask.to(advantages.dtype, copy=True).mul_(advantages.unsqueeze(-1))
    return advantages, advantages
