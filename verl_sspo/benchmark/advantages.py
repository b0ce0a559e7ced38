"""The estimator `sspo` beside verl's grpo and grpo_vectorized, through verl's registry."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import get_adv_estimator_fn

from verl_sspo.benchmark import machine
from verl_sspo.benchmark.table import Aim, Column, Row, Section
from verl_sspo.benchmark.timing import Spread, interleave

ESTIMATORS = ("sspo", "grpo", "grpo_vectorized")
GROUP = 8  # responses to a prompt

# float32 rewards and advantages and an int64 mask are there; an estimator adds less than as much again.
_BYTES_PER_TOKEN = 32

COLUMNS = (
    Column("estimator", "{estimator}"),
    Column("responses", "{responses:,}"),
    Column("tokens of each", "{tokens:,}"),
    Column("ms", "{ms:.2f}"),
    Column("quartiles", "{ms_q1:.2f} to {ms_q3:.2f}"),
    Column("/ sspo", "{to_sspo:.2f}"),
    Column("ns a token", "{ns_per_token:.3f}"),
)


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
    """Time of the estimators, on the CPU, where verl's trainer runs them.

    Args:
        sizes: numbers of responses, ascending.
        tokens: of a response, padding included; fewer where half of the free memory does not suffice.
        seconds: for the timing of one size.
    """
    rows: list[Row] = []
    for responses in sizes:
        room = machine.available_bytes(torch.device("cpu")) // 2 // (_BYTES_PER_TOKEN * responses)
        width = min(tokens, room)
        arguments = inputs(responses, width)
        spreads = interleave({name: partial(get_adv_estimator_fn(name), **arguments) for name in ESTIMATORS}, seconds)
        rows += rows_of(responses, width, spreads)
    note = f"Groups of {GROUP} responses; padded to the tokens given, half to all of them valid. On the CPU."
    return [Section("Advantage estimators", note, COLUMNS, rows, aims_of(rows))]


def rows_of(responses: int, tokens: int, spreads: dict[str, Spread]) -> list[Row]:
    return [
        {"estimator": name, "responses": responses, "tokens": tokens}
        | spread.in_ms()
        | {
            "to_sspo": spread.median / spreads["sspo"].median,
            "ns_per_token": 1e9 * spread.median / (responses * tokens),
        }
        for name, spread in spreads.items()
    ]


def aims_of(rows: Sequence[Row]) -> list[Aim]:
    """At least 5x as fast as grpo at 8,192 responses, never slower than grpo_vectorized, linear in tokens."""
    by_name = {name: [row for row in rows if row["estimator"] == name] for name in ESTIMATORS}
    aims = [
        Aim("grpo's time / sspo's at 8,192 responses", row["to_sspo"], 5.0, at_least=True)
        for row in by_name["grpo"]
        if row["responses"] == 8192
    ]
    closest = min(by_name["grpo_vectorized"], key=lambda row: row["to_sspo"])
    text = f"grpo_vectorized's time / sspo's, where it is smallest: {closest['responses']:,} responses"
    aims.append(Aim(text, closest["to_sspo"], 1.0, at_least=True))
    if len(by_name["sspo"]) > 1:
        smaller, larger = by_name["sspo"][-2:]
        counts = [row["responses"] * row["tokens"] for row in (smaller, larger)]
        exponent = math.log(larger["ms"] / smaller["ms"]) / math.log(counts[1] / counts[0])
        aims.append(Aim("exponent of sspo's time in the tokens, between the two largest sizes", exponent, 1.1))
    return aims
