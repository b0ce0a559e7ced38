"""The loss `sspo` beside verl's own, all through verl's registry and verl's calling convention."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import FSDPActorConfig, PolicyLossConfig

from verl_sspo.algorithm.gates import DOMAINS, SHAPES, SIDES
from verl_sspo.benchmark import machine
from verl_sspo.benchmark.bandwidth import BYTES_PER_TOKEN, copy_of_as_many
from verl_sspo.benchmark.host_reads import host_reads
from verl_sspo.benchmark.memory import peak_bytes, saved_bytes
from verl_sspo.benchmark.table import Aim, Column, Row, Section
from verl_sspo.benchmark.timing import interleave
from verl_sspo.config import SSPOPolicyLossConfig

VERL_LOSSES = ("vanilla", "gspo", "sapo", "geo_mean", "cispo")
# The preset v3.
DEFAULT = "sspo arctan log"
COPY = "copy of as many bytes"

# Above what the hungriest of the losses takes, inputs included.
_BYTES_PER_TOKEN_AT_PEAK = 160

COLUMNS = (
    Column("loss", "{loss}"),
    Column("ms", "{ms:.3f}"),
    Column("quartiles", "{ms_q1:.3f} to {ms_q3:.3f}"),
    Column("/ verl's fastest", "{to_fastest:.2f}"),
    Column("/ gspo", "{to_gspo:.2f}"),
    Column("/ geo_mean", "{to_geo_mean:.2f}"),
    Column("/ copy", "{to_copy:.2f}"),
    Column("saved", "{saved:.2f}"),
    Column("peak", "{peak:.2f}"),
    Column("peak / gspo's", "{peak_to_gspo:.2f}"),
    Column("host reads", "{host_reads}"),
)


@dataclass(frozen=True)
class Batch:
    """What verl's actor passes to a loss; all (micro_batch, length), float32, the mask bool."""

    log_prob: torch.Tensor
    old_log_prob: torch.Tensor
    advantages: torch.Tensor
    response_mask: torch.Tensor

    @classmethod
    def random(cls, micro_batch: int, length: int, device: torch.device) -> "Batch":
        """Responses of length/2 to length tokens, one advantage a response, |log-ratio| of about 0.1."""
        generator = torch.Generator().manual_seed(0)
        old_log_prob = -torch.rand(micro_batch, length, generator=generator)
        log_prob = old_log_prob + 0.1 * torch.randn(micro_batch, length, generator=generator)
        advantages = torch.randn(micro_batch, 1, generator=generator).expand(micro_batch, length).contiguous()
        lengths = torch.randint((length + 1) // 2, length + 1, (micro_batch, 1), generator=generator)
        tensors = [log_prob, old_log_prob, advantages, torch.arange(length) < lengths]
        return cls(*(tensor.to(device) for tensor in tensors))

    @property
    def inputs(self) -> list[torch.Tensor]:
        return [self.log_prob, self.old_log_prob, self.advantages, self.response_mask]


def sspo_config(gate: str, domain: str, side: str) -> SSPOPolicyLossConfig | None:
    """The loss with that gate at the default temperatures; None for the one combination that does not exist."""
    try:
        return SSPOPolicyLossConfig(loss_mode="sspo", gate=gate, gate_domain=domain, gate_side=side)
    except ValueError:
        return None


def contestants() -> dict[str, PolicyLossConfig]:
    """Every loss that is compared: verl's, and `sspo` with each gate, domain and side."""
    losses = {name: PolicyLossConfig(loss_mode=name) for name in VERL_LOSSES}
    for side in SIDES:
        for domain in DOMAINS:
            for gate in SHAPES:
                if config := sspo_config(gate, domain, side):
                    losses[f"sspo {gate} {domain}" + (" forward" if side == "forward" else "")] = config
    return losses


def bind(config: PolicyLossConfig, batch: Batch) -> Callable[[], torch.Tensor]:
    """The forward pass of a loss, called the way verl's actor calls it; its metrics are computed and dropped."""
    policy_loss = get_policy_loss_fn(config.loss_mode)
    actor = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=8,
        ppo_micro_batch_size_per_gpu=4,
        loss_agg_mode="seq-mean-token-mean",
        policy_loss=config,
    )

    def forward() -> torch.Tensor:
        loss, _metrics = policy_loss(
            old_log_prob=batch.old_log_prob,
            log_prob=batch.log_prob,
            advantages=batch.advantages,
            response_mask=batch.response_mask,
            loss_agg_mode=actor.loss_agg_mode,
            config=actor,
            rollout_is_weights=None,
        )
        return loss

    return forward


def measure(sizes: Sequence[tuple[int, int]], device: torch.device, seconds: float) -> list[Section]:
    """Time and memory of forward + backward, a section for each (micro-batch, length); `seconds` for the timing of one.

    A size for which the memory does not suffice is a section that says so.
    """
    return [_measure_size(micro_batch, length, device, seconds) for micro_batch, length in sizes]


def _measure_size(micro_batch: int, length: int, device: torch.device, seconds: float) -> Section:
    title = f"Losses, forward + backward, micro-batch {micro_batch} × {length:,} on {device.type.upper()}"
    tokens = micro_batch * length
    if tokens * _BYTES_PER_TOKEN_AT_PEAK > machine.available_bytes(device):
        return Section(title, "Not measured: there is too little free memory.")
    batch = Batch.random(micro_batch, length, device)
    batch.log_prob.requires_grad_()
    passes = {name: bind(config, batch) for name, config in contestants().items()}

    def both(forward: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), batch.log_prob)

    calls = {name: both(forward) for name, forward in passes.items()}
    spreads = interleave(calls | {COPY: copy_of_as_many(tokens, device)}, seconds, device)
    peaks = {name: peak_bytes(call, device) for name, call in calls.items()}

    unit = 4 * tokens  # a float32 tensor of (micro_batch, length)
    fastest = min(VERL_LOSSES, key=lambda name: spreads[name].median)
    rows: list[Row] = []
    for name, spread in spreads.items():
        row: Row = {"micro_batch": micro_batch, "length": length, "loss": name} | spread.in_ms()
        for key, other in (("fastest", fastest), ("gspo", "gspo"), ("geo_mean", "geo_mean"), ("copy", COPY)):
            row[f"to_{key}"] = spread.median / spreads[other].median
        is_loss = name in passes
        row["saved"] = saved_bytes(passes[name], batch.inputs) / unit if is_loss else None
        row["peak"] = peaks[name] / unit if is_loss else None
        row["peak_to_gspo"] = peaks[name] / peaks["gspo"] if is_loss else None
        row["host_reads"] = host_reads(calls[name], device) if is_loss else None
        rows.append(row)
    beyond_cache = BYTES_PER_TOKEN * tokens > machine.own_cache_bytes(device)
    note = (
        f"verl's fastest is {fastest}. Saved and peak count float32 tensors of this size: what autograd keeps beside "
        "the inputs, and the most that was allocated at a time beside them, the resulting gradient included. The copy "
        f"moves {BYTES_PER_TOKEN} bytes a token, {BYTES_PER_TOKEN * tokens / 2**20:.1f} MiB: "
        + ("more" if beyond_cache else "no more")
        + " than the caches of the cores in use."
    )
    return Section(title, note, COLUMNS, rows, aims_of(rows, fastest, device, beyond_cache))


def aims_of(rows: Sequence[Row], fastest: str, device: torch.device, beyond_cache: bool) -> list[Aim]:
    """The aims of one size, for the default gate and for the worst of all gates."""
    ours = [row for row in rows if row["loss"].startswith("sspo")]
    limits = [
        ("to_fastest", f"time / {fastest}'s, verl's fastest", 1.0),
        ("to_gspo", "time / gspo's", 0.5),
        ("to_geo_mean", "time / geo_mean's", 0.5),
        ("saved", "saved, float32 tensors", 1.0),
        ("peak_to_gspo", "peak memory / gspo's", 0.5),
    ]
    if beyond_cache:
        limits.append(("to_copy", "time / copy of as many bytes", 2.0 if device.type == "cuda" else 4.0))
    aims = []
    for key, text, limit in limits:
        default = next(row for row in ours if row["loss"] == DEFAULT)
        worst = max(ours, key=lambda row: row[key])
        aims.append(Aim(f"{DEFAULT}: {text}", default[key], limit))
        aims.append(Aim(f"worst gate ({worst['loss'].removeprefix('sspo ')}): {text}", worst[key], limit))
    return aims
