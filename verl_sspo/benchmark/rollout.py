"""The embedded rollout engine beside one batched `model.generate` of transformers: same model, same requests."""

import random
from collections.abc import Callable

import torch
from transformers import GenerationConfig, PreTrainedModel

from verl_sspo.benchmark.table import Aim, Column, Row, Section
from verl_sspo.benchmark.timing import Spread, interleave
from verl_sspo.cpu.generation import BatchedGenerator, Request, SamplingParams
from verl_sspo.quickstart.model import create_model, create_tokenizer

COLUMNS = (
    Column("engine", "{engine}"),
    Column("new tokens at most", "{max_new_tokens}"),
    Column("tokens", "{tokens:,}"),
    Column("tokens/s", "{tokens_per_second:,.0f}"),
    Column("ms", "{ms:.0f}"),
    Column("quartiles", "{ms_q1:.0f} to {ms_q3:.0f}"),
    Column("tokens/s / generate's", "{to_generate:.2f}"),
)


def prompts_of(count: int, longest: int = 64) -> list[list[int]]:
    """Ragged prompts of 4 to `longest` bytes."""
    rng = random.Random(0)
    return [[rng.randrange(256) for _ in range(rng.randint(4, longest))] for _ in range(count)]


def embedded(
    model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int, eos: int, pad: int
) -> Callable[[], int]:
    """A call that samples a response to every prompt with the embedded engine and returns how many tokens it drew."""
    generator = BatchedGenerator(model, pad_token_id=pad)
    requests = [
        Request(str(i), prompt, SamplingParams(max_new_tokens, stop_token_ids=(eos,), seed=i))
        for i, prompt in enumerate(prompts)
    ]
    return lambda: sum(len(completion.token_ids) for completion in generator.generate(requests))


def generate(
    model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int, eos: int, pad: int
) -> Callable[[], int]:
    """The same with `model.generate`: padded on the left, one batch until the last response ends."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=eos,
        pad_token_id=pad,
    )

    def call() -> int:
        torch.manual_seed(0)
        with torch.inference_mode():
            drawn = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:]  # type: ignore[operator]
        ended = (drawn == eos).cumsum(dim=-1)
        return int(((ended == 0) | ((ended == 1) & (drawn == eos))).sum())

    return call


def measure(requests: int, limits: tuple[int, ...], seconds: float) -> list[Section]:
    """Tokens per second for each limit on new tokens; `seconds` for the timing of one."""
    tokenizer = create_tokenizer()
    model = create_model(tokenizer, seed=0).eval()
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    prompts = prompts_of(requests)
    rows: list[Row] = []
    for limit in limits:
        calls = {
            "embedded": embedded(model, prompts, limit, eos, pad),
            "generate": generate(model, prompts, limit, eos, pad),
        }
        tokens = {name: call() for name, call in calls.items()}
        rows += rows_of(limit, tokens, interleave(calls, seconds))
    note = (
        f"{requests} ragged prompts of 4 to 64 tokens for the untrained tiny model, all at once, sampled at "
        "temperature 1 until the end-of-sequence token or the limit. Tokens are those drawn, without what `generate` "
        "pads ended responses with. The embedded engine also returns the log-probability of each, `generate` does not."
    )
    aims = [
        Aim(
            f"embedded tokens/s / generate's, {row['max_new_tokens']} new tokens",
            row["to_generate"],
            1.0,
            at_least=True,
        )
        for row in rows
        if row["engine"] == "embedded"
    ]
    return [Section("Embedded rollout", note, COLUMNS, rows, aims)]


def rows_of(limit: int, tokens: dict[str, int], spreads: dict[str, Spread]) -> list[Row]:
    rates = {name: tokens[name] / spread.median for name, spread in spreads.items()}
    return [
        {"engine": name, "max_new_tokens": limit, "tokens": tokens[name], "tokens_per_second": rates[name]}
        | spread.in_ms()
        | {"to_generate": rates[name] / rates["generate"]}
        for name, spread in spreads.items()
    ]
