"""The effect of verl's rollout-correction presets on SSPO: docs/rollout_correction.md is compared with verl's code."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from verl.trainer.config.algorithm import RolloutCorrectionConfig
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
from verl.utils.config import omega_conf_to_dataclass

from verl_sspo.compose import compose_config

PAGE = Path(__file__).parents[2] / "docs" / "rollout_correction.md"
# A policy that has drifted from its rollout: token log-ratios with standard deviation 0.05.
RESPONSES, LENGTH = 512, 200


def presets() -> list[str]:
    """verl's presets without bypass_mode. With bypass_mode verl applies weights and rejection only in its own loss."""
    names = [name for name, member in vars(RolloutCorrectionConfig).items() if isinstance(member, classmethod)]
    return [name for name in names if not getattr(RolloutCorrectionConfig, name)().bypass_mode]


def drifted() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    noise = 0.05 * torch.randn(RESPONSES, LENGTH, generator=random)
    # The shift makes E[exp(log-ratio)] = 1, as for log-ratios of two distributions.
    return torch.full((RESPONSES, LENGTH), -1.0), noise - 0.00125


@cache
def actor(algo: str) -> Any:
    config = omega_conf_to_dataclass(compose_config("quickstart", [f"algo={algo}"]).actor_rollout_ref.actor)
    config.global_batch_info.update(
        dp_size=1, batch_num_tokens=RESPONSES * LENGTH, global_batch_size=RESPONSES, loss_scale_factor=None
    )
    return config


def update(algo: str, weights: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor:
    """The gradient on policy, where only weights and mask can change it."""
    config = actor(algo)
    log_prob = drifted()[0].clone().requires_grad_()
    advantages = torch.tensor([1.0, -1.0]).repeat(RESPONSES // 2).unsqueeze(-1).expand(-1, LENGTH)
    loss, _ = get_policy_loss_fn(config.policy_loss.loss_mode)(
        old_log_prob=log_prob.detach(),
        log_prob=log_prob,
        advantages=advantages,
        response_mask=mask.bool(),
        loss_agg_mode=config.loss_agg_mode,
        config=config,
        rollout_is_weights=weights,
    )
    loss.backward()
    assert log_prob.grad is not None
    return log_prob.grad


def row(name: str) -> list[str]:
    """The preset's cells in the table: tokens and responses that train, and the size of the update."""
    options = getattr(RolloutCorrectionConfig, name)()
    log_prob, log_ratio = drifted()
    everything = torch.ones(RESPONSES, LENGTH)
    proto, mask, _ = compute_rollout_correction_and_rejection_mask(
        log_prob,
        log_prob - log_ratio,
        everything,
        rollout_is=options.rollout_is,
        rollout_is_threshold=options.rollout_is_threshold,
        rollout_rs=options.rollout_rs,
        rollout_rs_threshold=options.rollout_rs_threshold,
    )
    weights = None if proto is None else proto.batch["rollout_is_weights"]
    cells = [name]
    for algo in ("sspo", "gspo"):
        without, corrected = update(algo, None, everything), update(algo, weights, mask)
        if algo == "sspo":
            trains = corrected != 0
            cells += [f"{trains.float().mean():.3f}", f"{trains.any(dim=-1).float().mean():.3f}"]
        # The projection onto the update without correction: 1 if nothing changes.
        cells.append(f"{float((corrected * without).sum() / (without * without).sum()):.2f}")
    return cells


def test_the_page_has_a_row_for_every_preset():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    table = {
        cells[0].strip("`"): cells for line in lines for cells in [[each.strip() for each in line.split("|")[1:-1]]]
    }
    assert set(presets()) <= set(table)
    for name in presets():
        assert table[name][1:5] == row(name)[1:], name


def test_token_level_weights_shrink_the_geometric_mean():
    """If E[w] = 1, exp(E[log w]) = exp(-sd^2 / 2): 0.61 at a standard deviation of 1, although the mean weight is 1."""
    random = torch.Generator().manual_seed(0)
    log_w = torch.randn(RESPONSES, LENGTH, generator=random) - 0.5
    mask = torch.ones(RESPONSES, LENGTH)
    without = update("sspo", None, mask)
    shrunk = float((update("sspo", log_w.exp(), mask) * without).sum() / (without * without).sum())
    assert shrunk == pytest.approx(math.exp(-0.5), rel=0.02)
