"""SSPO in verl's calling conventions: thin adapters to `loss` and `advantage`, registered at import."""

import itertools
import math
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss
from verl.utils.metric import AggregationType, Metric
from verl.workers.config import ActorConfig

from verl_sspo.algorithm import nonfinite
from verl_sspo.algorithm.advantage import group_relative_advantages
from verl_sspo.algorithm.description import describe
from verl_sspo.algorithm.gates import Gate
from verl_sspo.algorithm.loss import runs_in_triton, sspo_loss
from verl_sspo.config import SSPOAdvantageConfig

_announced = False
# Calls of the loss and of the estimator in this process; verl passes the step to neither.
_loss_calls = itertools.count(1)
_estimator_calls = itertools.count(1)


def _announce(config: ActorConfig, log_prob: torch.Tensor) -> None:
    """Prints the effective settings, once, in the log of the actor's first rank."""
    global _announced
    if not _announced and (not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0):
        triton = runs_in_triton(config.policy_loss.get("kernel", "auto"), log_prob.device, torch.float32)
        print(f"{describe(config)}\n  loss in      {'a Triton kernel' if triton else 'PyTorch'}", flush=True)
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
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """Computes SSPO's policy loss (arXiv:2602.19327) for verl, see `sspo_loss`.

    Args:
        config: the actor's configuration: `policy_loss` for the gate, `global_batch_info` for the aggregation.
        others: as in `sspo_loss`.

    Returns:
        (loss, metrics): a scalar, and the diagnostics of `verl_sspo.algorithm.metrics`, one number per response.

    Raises:
        ValueError: if `config` is not an ActorConfig, or on shapes or a mode that `sspo_loss` rejects.
        FloatingPointError: if `policy_loss.stop_on_nonfinite` is set and an input is unusable at a valid token.
    """
    if not isinstance(config, ActorConfig):
        raise ValueError(f"the loss `sspo` needs verl's ActorConfig as `config`, got {type(config).__name__}")
    _announce(config, log_prob)
    loss, diagnostics = sspo_loss(
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        Gate.of_policy_loss(config.policy_loss),
        loss_agg_mode=loss_agg_mode,
        rollout_is_weights=rollout_is_weights,
        kernel=config.policy_loss.get("kernel", "auto"),
        **config.global_batch_info,
    )
    call = next(_loss_calls)
    metrics = {}
    for name, values in diagnostics.as_metrics().items():
        metrics[name] = Metric(AggregationType.MEAN)
        for value in values:
            metrics[name].append(value)
    if any(metrics["sspo/nonfinite"].values):
        nonfinite.report(
            diagnostics.inputs,
            diagnostics.mask,
            call,
            "A NaN makes the loss NaN, and verl's FSDP actor then skips the update. An infinite log-ratio saturates "
            "its gate. The metric actor/sspo/nonfinite is the fraction of such tokens at each step.",
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
    """Computes group-relative advantages for verl, see `group_relative_advantages`.

    In an agent loop a session may have several outputs, each a row of the batch. As in verl's grpo, the last output of
    each session is compared with those of the other sessions, and all outputs of a session get its advantage.

    Args:
        token_level_rewards: (bs, response_length); the reward of a response is their sum.
        response_mask: valid tokens, (bs, response_length).
        index: uid of the prompt of each response, (bs,).
        config: verl's `algorithm` section: `norm_adv_by_std_in_grpo`, and `sspo` for `SSPOAdvantageConfig`.
        **kwargs: ignored; verl passes more to other estimators.

    Returns:
        (advantages, returns): the same tensor, (bs, response_length), 0 outside of `response_mask`.

    Raises:
        ValueError: if the length of `index` is not that of the batch, or on invalid options.
        FloatingPointError: if `algorithm.sspo.stop_on_nonfinite` is set and a reward is not finite.
    """
    if len(index) != len(token_level_rewards):
        raise ValueError(f"index has {len(index)} entries for {len(token_level_rewards)} responses")
    options = SSPOAdvantageConfig.from_algorithm(config)
    keys = _output_keys()
    # The rows whose rewards are compared, and for each row of the batch the position of its session among them.
    final, session = _sessions(keys) if keys is not None else (list(range(len(index))),) * 2
    # pandas.factorize is hardly faster, and importing pandas takes 6 % of `import verl` in every process of a run.
    numbers: dict[Any, int] = {}
    groups = torch.tensor([numbers.setdefault(index[row], len(numbers)) for row in final], dtype=torch.int64)
    with torch.no_grad():
        rewards = token_level_rewards.sum(dim=-1)
        call = next(_estimator_calls)
        # Transfers one number to the host: a sum is finite only if all of its terms are.
        if not math.isfinite(rewards.sum()):
            nonfinite.report(
                {"rewards": rewards},
                torch.ones_like(rewards, dtype=torch.bool),
                call,
                "The advantages of their groups are NaN, and updates with them are skipped. Check the reward function.",
                stop=options.stop_on_nonfinite,
            )
        if len(final) < len(index):
            rewards = rewards[final]
        advantages = group_relative_advantages(
            rewards,
            groups.to(rewards.device),
            normalize_by_std=True if config is None else config.get("norm_adv_by_std_in_grpo", True),
            baseline=options.baseline,
            std_floor=options.std_floor,
        )
        if len(final) < len(index):
            # As in verl's grpo, a session whose final output is masked has advantage 0.
            advantages = (advantages * response_mask[final].any(dim=-1))[session]
        # In place: multiplying by an integer mask would convert it once more, and new memory is the main cost.
        advantages = response_mask.to(advantages.dtype, copy=True).mul_(advantages.unsqueeze(-1))
    return advantages, advantages


def _output_keys() -> Sequence[str] | None:
    """The keys "{uid}_{session}_{output}" of the batch's rows, or None if the caller is not verl's V1 trainer.

    verl handles sessions of several outputs itself, but only for the estimator grpo
    (`compute_advantage_for_multi_trajectories` in verl/trainer/ppo/v1/utils.py). verl 0.9.1 passes other estimators the
    rewards, mask, uid and the section `algorithm`, but not the keys. An agent loop cannot add them: the trainer reads
    seven fixed fields of each row (`PPOTrainer._compute_advantage`). So they are read from the stack frame of that
    function, which calls the estimator. tests/unit/test_advantage.py tests this with the installed verl.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "compute_advantage_for_multi_trajectories":
            return frame.f_locals["batch_keys"]
        frame = frame.f_back
    return None


def _sessions(keys: Sequence[str]) -> tuple[list[int], list[int]]:
    """The row of each session's final output, and for each row the position of its session in that list."""
    names = [key.rsplit("_", 1) for key in keys]
    last: dict[str, tuple[int, int]] = {}
    for row, (name, output) in enumerate(names):
        last[name] = max(last.get(name, (-1, -1)), (int(output), row))
    positions = {name: position for position, name in enumerate(last)}
    return [row for _, row in last.values()], [positions[name] for name, _ in names]
