"""Compares the estimator `sspo` with verl's grpo and grpo_vectorized, all from verl's registry."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import verl  # noqa: F401  loads the plugin
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import get_adv_estimator_fn

from verl_sspo.benchmark.measure import Section, side_by_side

ESTIMATORS = ("sspo", "grpo", "grpo_vectorized")
GROUP = 8  # responses per prompt


def inputs(responses: int, tokens: int) -> dict[str, Any]:
    """The arguments of an estimator in verl's trainer: reward 0 or 1 at the last token, groups of 8, int64 mask."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint((tokens + 1) // 2, tokens + 1, (responses,), generator=generator)
    rewards = torch.zeros(responses, tokens)
    rewards[torch.arange(responses), lengths - 1] = torch.randint(2, (responses,), generator=generator).float()
    return {
        "token_level_rewards": rewards,
        "response_mask": (torch.arange(tokens) < lengths.unsqueeze(-1)).long(),
        "index": np.array([f"prompt-{i // GROUP}" for i in range(responses)], dtype=object),
        "config": OmegaConf.create({"norm_adv_by_std_in_grpo": True}),
    }


def measure(sizes: Sequence[int], tokens: int, seconds: float) -> list[Section]:
    """Time of the estimators on the CPU, where verl's trainer runs them.

    Args:
        sizes: numbers of responses.
        tokens: per response, padding included.
        seconds: time to spend on one size.
    """
    sections = []
    for responses in sizes:
        arguments = inputs(responses, tokens)
        calls = {name: partial(get_adv_estimator_fn(name), **arguments) for name in ESTIMATORS}
        table = side_by_side(calls, seconds)
        table["/ sspo"] = table["ms"] / table.loc["sspo", "ms"]
        table["ns per token"] = 1e6 * table["ms"] / (responses * tokens)
        title = f"Advantage estimators, {responses:,} responses × {tokens:,} tokens"
        note = f"On the CPU; milliseconds (median, quartiles); groups of {GROUP}; half to all of the tokens are valid."
        sections.append(Section(title, note, table))
    return sections
