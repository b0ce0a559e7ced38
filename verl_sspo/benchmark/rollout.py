"""Compares the rollout engine on a CPU with one batched `model.generate` of transformers: same model and requests."""

import random
from collections.abc import Callable, Sequence

import pandas as pd
import torch
from transformers import GenerationConfig, PreTrainedModel

from verl_sspo.benchmark.measure import Section, side_by_side
from verl_sspo.hf.generation import BatchedGenerator, Request, SamplingParams
from verl_sspo.quickstart.model import create_model, create_tokenizer

Prompts = list[list[int]]


def ours(model: PreTrainedModel, prompts: Prompts, max_new_tokens: int, eos: int, pad: int) -> Callable[[], int]:
    """A call that samples a response to every prompt and returns how many tokens it drew."""
    generator = BatchedGenerator(model, pad_token_id=pad)
    requests = [
        Request(str(i), prompt, SamplingParams(max_new_tokens, stop_token_ids=(eos,), seed=i))
        for i, prompt in enumerate(prompts)
    ]
    return lambda: sum(len(completion.token_ids) for completion in generator.generate(requests))


def generate(model: PreTrainedModel, prompts: Prompts, max_new_tokens: int, eos: int, pad: int) -> Callable[[], int]:
    """The same with `model.generate`: padded on the left, one batch until the last response ends."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=True, temperature=1.0, top_k=0, eos_token_id=eos, pad_token_id=pad
    )

    def call() -> int:
        torch.manual_seed(0)
        with torch.inference_mode():
            drawn = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:]  # type: ignore[operator]
        before_end = (drawn == eos).cumsum(dim=-1) - (drawn == eos).long()  # 0 up to and including the first eos
        return int((before_end == 0).sum())

    return call


def measure(requests: int, limits: Sequence[int], seconds: float) -> list[Section]:
    """Tokens per second.

    Args:
        requests: prompts of 4 to 64 tokens.
        limits: limits on new tokens; one row per limit and engine.
        seconds: time to spend on one limit.
    """
    tokenizer = create_tokenizer()
    model = create_model(tokenizer, seed=0).eval()
    rng = random.Random(0)
    prompts = [[rng.randrange(256) for _ in range(rng.randint(4, 64))] for _ in range(requests)]
    tables = []
    for limit in limits:
        engines = {"cpu": ours, "generate": generate}
        calls = {
            name: engine(model, prompts, limit, tokenizer.eos_token_id, tokenizer.pad_token_id)
            for name, engine in engines.items()
        }
        table = side_by_side(calls, seconds)
        table.insert(0, "new tokens at most", limit)
        table["tokens/s"] = pd.Series({name: call() for name, call in calls.items()}) / table["ms"] * 1e3
        table["/ generate"] = table["tokens/s"] / table.loc["generate", "tokens/s"]
        tables.append(table)
    note = (
        f"{requests} prompts of 4 to 64 tokens at once for the untrained tiny model, sampled at temperature 1; "
        "milliseconds (median, quartiles). Padding after the end of a response does not count as tokens. The CPU "
        "engine also returns the log-probability of each token."
    )
    return [Section("Rollout on a CPU", note, pd.concat(tables))]
