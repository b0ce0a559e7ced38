"""Compares the loss `sspo` with verl's own, all from verl's registry."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pandas as pd
import torch
from verl.workers.config import ActorConfig, PolicyLossConfig

from verl_sspo.algorithm.gates import DOMAINS, SHAPES
from verl_sspo.analysis.objectives import actor_config, policy_loss, with_policy_loss
from verl_sspo.benchmark.measure import Section, peak_bytes, saved_bytes, side_by_side

VERL_LOSSES = ("vanilla", "gspo", "sapo", "geo_mean", "cispo")
# The fewest bytes that a loss with a separate backward pass moves per token. Forward: reads log_prob, old_log_prob and
# advantages (float32) and the mask (bool), writes the gradient. Backward: reads the gradient and writes its product.
FLOOR_BYTES_PER_TOKEN = (3 * 4 + 1 + 4) + (4 + 4)
FLOOR = "copy of the least bytes"


def random_batch(micro_batch: int, length: int, device: torch.device) -> list[torch.Tensor]:
    """log_prob, old_log_prob, advantages, response_mask, all (micro_batch, length); |log-ratio| of about 0.1.

    Responses have length/2 to length tokens and one advantage each.
    """
    generator = torch.Generator().manual_seed(0)
    old_log_prob = -torch.rand(micro_batch, length, generator=generator)
    log_prob = old_log_prob + 0.1 * torch.randn(micro_batch, length, generator=generator)
    advantages = torch.randn(micro_batch, 1, generator=generator).expand(micro_batch, length).contiguous()
    lengths = torch.randint((length + 1) // 2, length + 1, (micro_batch, 1), generator=generator)
    tensors = [tensor.to(device) for tensor in (log_prob, old_log_prob, advantages, torch.arange(length) < lengths)]
    tensors[0].requires_grad_()
    return tensors


def contestants() -> dict[str, ActorConfig]:
    """verl's losses and `sspo` with every gate, all with the same aggregation."""
    ours = actor_config(["algo=sspo"])
    losses = {name: replace(ours, policy_loss=PolicyLossConfig(loss_mode=name)) for name in VERL_LOSSES}
    for domain in DOMAINS:
        for gate in SHAPES:
            losses[f"sspo {gate} {domain}"] = with_policy_loss(ours, gate=gate, gate_domain=domain)
    losses["sspo forward"] = actor_config(["algo=sspo_forward"])
    return losses


def gradient(config: ActorConfig, batch: Sequence[torch.Tensor]) -> torch.Tensor:
    """Forward and backward pass of a loss: dloss / dlog_prob."""
    return torch.autograd.grad(policy_loss(config, *batch), batch[0])[0]


def measure(sizes: Sequence[tuple[int, int]], device: torch.device, seconds: float) -> list[Section]:
    """Time and memory of forward + backward, a section per (micro-batch, length).

    Args:
        sizes: (micro-batch, length).
        device: where the losses are computed.
        seconds: time to spend on one size.
    """
    return [_measure_size(micro_batch, length, device, seconds) for micro_batch, length in sizes]


def _measure_size(micro_batch: int, length: int, device: torch.device, seconds: float) -> Section:
    batch = random_batch(micro_batch, length, device)
    configs = contestants()
    if device.type == "cuda":
        configs["sspo in PyTorch"] = with_policy_loss(actor_config(["algo=sspo"]), kernel="torch")
    calls: dict[str, Callable[[], object]] = {name: partial(gradient, each, batch) for name, each in configs.items()}
    source = torch.ones(micro_batch * length * FLOOR_BYTES_PER_TOKEN // 2, dtype=torch.uint8, device=device)
    table = side_by_side(calls | {FLOOR: partial(torch.empty_like(source).copy_, source)}, seconds)
    fastest = table.loc[list(VERL_LOSSES), "ms"].idxmin()
    for title, other in (("fastest", fastest), ("gspo", "gspo"), ("geo_mean", "geo_mean"), ("copy", FLOOR)):
        table[f"/ {title}"] = table["ms"] / table.loc[other, "ms"]
    bytes_per_tensor = 4 * micro_batch * length
    table["saved"] = pd.Series(
        {name: saved_bytes(partial(policy_loss, each, *batch), batch) for name, each in configs.items()}
    ).div(bytes_per_tensor)
    table["peak"] = pd.Series({name: peak_bytes(call, device) for name, call in calls.items()}).div(bytes_per_tensor)
    table["peak / gspo"] = table["peak"] / table.loc["gspo", "peak"]
    note = (
        f"Forward + backward; milliseconds (median, quartiles). `fastest` is verl's fastest loss, {fastest}. Saved: "
        "what autograd keeps beside the inputs. Peak: the most that was allocated beside them, the gradient included. "
        f"Both in float32 tensors of this size. The copy moves {FLOOR_BYTES_PER_TOKEN} bytes per token."
    )
    return Section(f"Losses, micro-batch {micro_batch} × {length:,} on {device.type.upper()}", note, table)
