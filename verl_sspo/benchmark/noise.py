"""How much log-probs of the same weights differ between passes, and how much gradient a gate removes because of it.

verl computes the old log-probs in one pass and the current ones in another, which groups rows differently. In bfloat16
a row's log-probs depend on its group, so the log-ratio z of an unchanged policy is not 0. The consequences are in
`docs/performance/bf16_noise.md`.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from verl_sspo.algorithm.gates import DOMAINS, SHAPES, Gate
from verl_sspo.hf.generation import BatchedGenerator, Request, SamplingParams

PROMPT = "Question: Ann has 5 pens and buys 2 more. How many pens does Ann have now?\nAnswer:"
ROWS = 16
MICRO_BATCH = 8  # rows of the first pass
QUANTILES = (0.5, 0.9, 0.99)
TEMPERATURES = (1.0, 2.0, 5.0, 10.0, 20.0)
KEPT = 0.99  # mean slope on policy that a temperature should keep
ROLLOUT = "rollout, then trainer"


class Precision(NamedTuple):
    """How a forward pass is computed.

    Args:
        weights: dtype of the parameters.
        autocast: dtype of torch's autocast, or None.
        head: dtype of the output layer and of the logits, or None for the same as the rest.
    """

    weights: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    head: torch.dtype | None = None


PRECISIONS = {
    "float32": Precision(),
    "bf16 autocast": Precision(autocast=torch.bfloat16),
    "bf16 weights": Precision(torch.bfloat16),
    "bf16 weights, float32 logits": Precision(torch.bfloat16, head=torch.float32),
}


def prepare(model: PreTrainedModel, precision: Precision) -> PreTrainedModel:
    """A copy of the model in this precision, without autocast."""
    model = copy.deepcopy(model).to(precision.weights)  # type: ignore[arg-type]  # transformers wraps it
    if precision.head is not None:
        head = copy.deepcopy(model.get_output_embeddings()).to(precision.head)
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(precision.head),))
        model.set_output_embeddings(head)
    return model


def log_probs(
    model: PreTrainedModel, prompt: Sequence[int], responses: Sequence[Sequence[int]], batches: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Log-probs of the responses, (rows, longest) float32, 0 where a response has ended.

    Args:
        batches: rows of each forward pass, packed one after the other without padding, as in verl.
    """
    result = torch.zeros(len(responses), max(map(len, responses)), device=model.device)
    for rows in batches:
        sequences = [torch.tensor([*prompt, *responses[row]], device=model.device) for row in rows]
        part = torch.cat([torch.full_like(sequence, i) for i, sequence in enumerate(sequences)])
        visible = (part[:, None] == part[None, :]).tril()
        logits = model(
            input_ids=torch.cat(sequences)[None],
            attention_mask=visible[None, None],
            position_ids=torch.cat([torch.arange(len(sequence), device=model.device) for sequence in sequences])[None],
            use_cache=False,
        ).logits[0]
        for row, sequence, of_row in zip(rows, sequences, logits.split([len(each) for each in sequences]), strict=True):
            tokens = sequence[len(prompt) :]
            of_row = of_row[len(prompt) - 1 : -1].float().log_softmax(dim=-1)
            result[row, : len(tokens)] = of_row.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return result


def batches(order: Sequence[int], size: int) -> list[list[int]]:
    return [list(order[start : start + size]) for start in range(0, len(order), size)]


def packings(rows: int) -> dict[str, list[list[int]]]:
    """The micro-batches of the second pass. The first pass takes `MICRO_BATCH` rows at a time, in order."""
    shuffled = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).tolist()
    return {
        "same micro-batches": batches(range(rows), MICRO_BATCH),
        "half as many rows": batches(range(rows), MICRO_BATCH // 2),
        "another order": batches(shuffled, MICRO_BATCH),
    }


def sample(
    model: PreTrainedModel, prompt: Sequence[int], length: int, seed: int = 0
) -> tuple[list[list[int]], torch.Tensor]:
    """Responses of length / 2 to length tokens, drawn from the model, and the log-probs that the rollout saw."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint((length + 1) // 2, length + 1, (ROWS,), generator=generator).tolist()
    requests = [Request(str(i), prompt, SamplingParams(n, seed=seed + i)) for i, n in enumerate(lengths)]
    drawn = BatchedGenerator(model).generate(requests)
    seen = pad_sequence([torch.tensor(each.log_probs) for each in drawn], batch_first=True)
    return [each.token_ids for each in drawn], seen.to(model.device)


@torch.no_grad()
def log_ratios(
    model: PreTrainedModel, prompt: Sequence[int], length: int, precision: Precision
) -> dict[str, torch.Tensor]:
    """z of all valid tokens, (tokens,) float64, for each kind of second pass."""
    # As in verl, the rollout's weights have the dtype that the trainer computes in.
    responses, seen = sample(prepare(model, Precision(precision.autocast or precision.weights)), prompt, length)
    model = prepare(model, precision)
    # A new context per pass: autocast keeps the weights it has cast until it exits.
    passing: Callable[[], AbstractContextManager] = nullcontext
    if precision.autocast is not None:
        passing = partial(torch.autocast, model.device.type, precision.autocast)

    def computed(rows: list[list[int]]) -> torch.Tensor:
        with passing():
            return log_probs(model, prompt, responses, rows)

    first = computed(batches(range(ROWS), MICRO_BATCH))
    second = {name: computed(rows) for name, rows in packings(ROWS).items()}
    differences = {name: each - first for name, each in second.items()} | {ROLLOUT: first - seen}
    longest = torch.arange(first.shape[1], device=first.device)
    mask = longest < torch.tensor([[len(response)] for response in responses], device=first.device)
    return {name: z[mask].double() for name, z in differences.items()}


def slope(shape: str, domain: str, tau: float, z: torch.Tensor) -> float:
    """The value of `actor/sspo/slope` for these log-ratios, with both temperatures `tau`."""
    gate, temperature = Gate(shape, domain, tau, tau), torch.tensor(tau, dtype=z.dtype, device=z.device)
    return float((gate.log_value_and_slope(z, temperature)[1] / gate.on_policy_slope(temperature)).mean())


def largest_temperature(shape: str, z: torch.Tensor) -> float:
    """The largest temperature at which the log-domain gate keeps `KEPT` of the gradient; infinite if z is 0."""
    low, high = 1e-3, 1e6
    if slope(shape, "log", high, z) > KEPT:
        return float("inf")
    for _ in range(40):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(shape, "log", middle, z) > KEPT else (low, middle)
    return low


def noise(z: torch.Tensor) -> dict[str, float]:
    """Mean, root mean square, quantiles and maximum of abs(z)."""
    distance = z.abs()
    quantiles = torch.quantile(distance, torch.tensor(QUANTILES, dtype=z.dtype, device=z.device)).tolist()
    return {
        "mean": float(distance.mean()),
        "rms": float(z.square().mean().sqrt()),
        **{f"{q:.0%}": value for q, value in zip(QUANTILES, quantiles, strict=True)},
        "max": float(distance.max()),
    }


def load(folder: Path) -> tuple[str, PreTrainedModel, list[int]]:
    """Loads a Hugging Face folder: its name, the model in float32 and the prompt's token ids."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return folder.name, model.eval(), AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"]


def random_model(device: str) -> tuple[str, PreTrainedModel, list[int]]:
    """As `load`: a Qwen2 with 100 million random weights, large enough for probabilities far from uniform."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        initializer_range=0.05,
        tie_word_embeddings=True,
    )
    with torch.device(device):
        return "random weights", Qwen2ForCausalLM(config).eval(), list(range(100, 120))


def measure(
    name: str, model: PreTrainedModel, prompt: Sequence[int], lengths: Sequence[int]
) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Two tables, each a title, a note and rows: the noise, and the gradient that each gate and temperature keeps.

    The second table is for the noisiest case in which both passes are the trainer's.
    """
    noises = []
    worst, of = torch.zeros(1), ""
    for precision, length in itertools.product(PRECISIONS, lengths):
        for packing, z in log_ratios(model, prompt, length, PRECISIONS[precision]).items():
            case = {"precision": precision, "second pass": packing, "tokens": length}
            slopes = {"slope at 10": slope("arctan", "log", 10.0, z), "tau": largest_temperature("arctan", z)}
            noises.append(case | noise(z) | slopes)
            if packing != ROLLOUT and z.square().mean() >= worst.square().mean():
                worst, of = (
                    z,
                    f"{precision}, {packing}, up to {length} tokens: the mean slope, by gate and temperature.",
                )
    kept = [
        {"gate": f"{shape} {domain}"} | {f"tau {tau:g}": slope(shape, domain, tau, worst) for tau in TEMPERATURES}
        for domain, shape in itertools.product(DOMAINS, SHAPES)
    ]
    note = (
        f"{ROWS} responses of half to all of the tokens, {MICRO_BATCH} in a micro-batch of the first pass, without "
        "padding. Mean, root mean square, quantiles and maximum of abs(z), in nats per token; the slope of the arctan "
        f"gate at temperature 10, and the temperature at which it is {KEPT}."
    )
    return [
        (f"Noise of log-probs, {name}", note, noises),
        (f"Gradient that is left on policy, {name}", of, kept),
    ]
