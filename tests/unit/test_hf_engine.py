"""The engine for short responses computes the same log-probs, entropies and gradients as verl's own engine."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPEngineConfig
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from verl_sspo.hf.engine import SharedPromptEngine
from verl_sspo.quickstart.model import create_model, create_tokenizer

# (prompt length, response length). Prompts of the same length are equal.
LENGTHS = [(7, 4), (3, 6), (9, 1), (7, 2), (3, 1), (7, 5)]


def micro_batch(temperature):
    torch.manual_seed(0)
    prompts = {prompt: torch.randint(256, (prompt,)) for prompt, _ in LENGTHS}
    ids = [(prompts[prompt], torch.randint(256, (response,))) for prompt, response in LENGTHS]
    columns = {
        "prompts": [prompt for prompt, _ in ids],
        "responses": [response for _, response in ids],
        "input_ids": [torch.cat(pair) for pair in ids],
        "position_ids": [torch.arange(sum(pair)) for pair in LENGTHS],
    }
    nested = {name: torch.nested.as_nested_tensor(rows, layout=torch.jagged) for name, rows in columns.items()}
    batch = TensorDict(nested, batch_size=len(LENGTHS))
    tu.assign_non_tensor(batch, use_remove_padding=False, calculate_entropy=True, temperature=temperature)
    return batch


def outputs(engine_class, model, batch):
    engine = engine_class.__new__(engine_class)
    engine.pad_to_length, engine.engine_config = 0, FSDPEngineConfig()
    engine.model_config = SimpleNamespace(hf_config=model.config)
    # Our tensors without an explicit device are now on another device than the micro-batch, as on a GPU.
    elsewhere = torch.device("meta") if engine_class is SharedPromptEngine else nullcontext()
    with elsewhere:
        inputs, output_args = engine.prepare_model_inputs(batch)
    raw = model(**inputs, use_cache=False)
    with elsewhere:
        return raw.logits.shape[:2], engine.prepare_model_outputs(raw, output_args, batch, None)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_responses_have_what_verl_computes(temperature):
    tokenizer = create_tokenizer()
    model = create_model(tokenizer, seed=0)
    gradients, values = [], []
    for engine_class in (FSDPEngineWithLMHead, SharedPromptEngine):
        batch = micro_batch(temperature)
        shape, computed = outputs(engine_class, model, batch)
        parts = [
            torch.cat([row[prompt - 1 : -1] for row, (prompt, _) in zip(computed[name].unbind(), LENGTHS, strict=True)])
            for name in ("log_probs", "entropy")
        ]
        weights = torch.linspace(-1, 1, len(parts[0]))
        model.zero_grad()
        sum((weights * part).sum() for part in parts).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        values.append(parts)
    # One row per prompt. The longest row, a prompt with its three responses, has 18 tokens. The first 2 tokens are left
    # out: the shortest prompt has 3, and only its last one predicts a response.
    assert shape == (3, 18 - 2)
    for verls, ours in zip(values[0] + gradients[0], values[1] + gradients[1], strict=True):
        torch.testing.assert_close(ours, verls)


def test_verls_other_ways_are_left_alone():
    batch = micro_batch(1.0)
    tu.assign_non_tensor(batch, calculate_sum_pi_squared=True)
    shape, computed = outputs(SharedPromptEngine, create_model(create_tokenizer(), seed=0), batch)
    assert shape == (6, 12)
    assert "sum_pi_squared" in computed
