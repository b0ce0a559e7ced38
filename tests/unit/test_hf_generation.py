"""Batched sampling, compared with transformers' own generate, forward pass and logits processors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.integrations import sdpa_attention

from verl_sspo.cpu import internals
from verl_sspo.hf.generation import BatchedGenerator, Request, SamplingParams, sample

VOCABULARY = 50
SIZE = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    pad_token_id=0,
)


def make_model(seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    # Large initial weights: probabilities far from uniform.
    config = Qwen2Config(**SIZE, num_key_value_heads=2, initializer_range=0.3, eos_token_id=None, bos_token_id=None)
    return Qwen2ForCausalLM(config).eval()


def make_sliding_window_model() -> MistralForCausalLM:
    torch.manual_seed(0)
    config = MistralConfig(**SIZE, num_key_value_heads=2, sliding_window=4, initializer_range=0.3, eos_token_id=None)
    return MistralForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    return make_model()


def make_requests(count: int, **options) -> list[Request]:
    """Requests with prompts and limits of many lengths."""
    generator = torch.Generator().manual_seed(7)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    return [
        Request(
            f"request {i}",
            [draw(1, VOCABULARY) for _ in range(draw(1, 12))],
            SamplingParams(**{"max_tokens": draw(1, 20), "seed": i, **options}),
        )
        for i in range(count)
    ]


def log_probs_by_forward_pass(model, request, token_ids, temperature=1.0) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([[*request.prompt_ids, *token_ids]])).logits[0]
    log_probs = (logits / temperature).log_softmax(dim=-1)[len(request.prompt_ids) - 1 : -1]
    return log_probs.gather(1, torch.tensor(token_ids).unsqueeze(1)).squeeze(1)


def count_forward_passes(model) -> list[tuple[int, ...]]:
    """A list to which every forward pass appends the shape of its input."""
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def test_greedy_tokens_are_those_of_transformers(model):
    requests = make_requests(16, temperature=0.0)
    completions = BatchedGenerator(model).generate(requests)
    for request, completion in zip(requests, completions, strict=True):
        prompt = torch.tensor([request.prompt_ids])
        expected = model.generate(prompt, do_sample=False, max_new_tokens=request.params.max_tokens)
        assert completion.token_ids == expected[0, prompt.shape[1] :].tolist()
        torch.testing.assert_close(
            torch.tensor(completion.log_probs),
            log_probs_by_forward_pass(model, request, completion.token_ids),
            atol=1e-5,
            rtol=0,
        )


@pytest.mark.parametrize("make", [make_model, make_sliding_window_model])
def test_log_probs_are_those_of_a_forward_pass_also_when_requests_come_and_go(make):
    model = make()
    requests = make_requests(12, temperature=0.7, top_k=20, top_p=0.95)
    generator = BatchedGenerator(model, max_num_seqs=5)
    completions = {}
    for request in requests:  # One joins at each step.
        generator.submit(request)
        completions.update((c.request, c) for c in generator.step())
    while generator.unfinished:
        completions.update((c.request, c) for c in generator.step())
    assert completions.keys() == set(requests)
    for request in requests:
        completion = completions[request]
        assert len(completion.token_ids) == request.params.max_tokens
        torch.testing.assert_close(
            torch.tensor(completion.log_probs),
            log_probs_by_forward_pass(model, request, completion.token_ids, temperature=0.7),
            atol=1e-5,
            rtol=1e-5,  # float32, divided by the temperature: the last digits depend on the CPU's kernels
        )


def test_a_sequence_does_not_depend_on_its_batch(model):
    requests = make_requests(16)
    together = BatchedGenerator(model).generate(requests)
    backwards = BatchedGenerator(model, max_num_seqs=3).generate(requests[::-1])[::-1]
    alone = [BatchedGenerator(model).generate([request])[0] for request in requests]
    assert [c.token_ids for c in together] == [c.token_ids for c in backwards] == [c.token_ids for c in alone]


def test_a_sequence_does_not_depend_on_truncation_of_others(model):
    plain, *_ = make_requests(1, max_tokens=10)
    truncated = Request("truncated", [3, 4], SamplingParams(max_tokens=10, top_k=3, top_p=0.5))
    alone = BatchedGenerator(model).generate([plain])[0]
    assert BatchedGenerator(model).generate([plain, truncated])[0].token_ids == alone.token_ids


def test_tensors_are_made_on_the_models_device(model):
    requests = make_requests(8)
    expected = BatchedGenerator(model).generate(requests)
    # Tensors without an explicit device are now on another device than the model, as on a machine with a GPU.
    with torch.device("meta"):
        generator = BatchedGenerator(model)
        completions = generator.generate(requests)
        for request in requests:
            generator.submit(request)
        generator.step()
        aborted = generator.abort()
    assert [(c.token_ids, c.log_probs) for c in completions] == [(c.token_ids, c.log_probs) for c in expected]
    assert [c.token_ids for c in aborted] == [each.token_ids[:1] for each in expected]


def test_other_seeds_draw_other_tokens(model):
    prompt = [1, 2, 3]
    requests = [Request(str(i), prompt, SamplingParams(max_tokens=12, temperature=2.0, seed=i)) for i in range(20)]
    assert len({tuple(c.token_ids) for c in BatchedGenerator(model).generate(requests)}) == 20


def draw_with_even_uniforms(logits, temperature=1.0, top_k=-1, top_p=1.0, count=20_000) -> torch.Tensor:
    """Frequencies (vocabulary,) of the tokens drawn with `count` evenly spaced numbers instead of random ones."""
    tokens, _ = sample(logits.expand(count, -1), temperature, top_k, top_p, (torch.arange(count) + 0.5) / count)
    return torch.bincount(tokens, minlength=len(logits)) / count


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.2, 3.0),
    top_k=st.integers(1, 30),
    top_p=st.floats(0.05, 0.999),
)
def test_frequencies_are_those_of_transformers_logits_processors(seed, temperature, top_k, top_p):
    logits = 2 * torch.randn(30, generator=torch.Generator().manual_seed(seed))
    expected = logits.unsqueeze(0)
    for processor in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)):
        expected = processor(None, expected)
    expected = expected.softmax(dim=-1)[0]
    found = draw_with_even_uniforms(logits, temperature, top_k, top_p, count=5000)
    # Each end of a token's interval may have one draw more or less.
    torch.testing.assert_close(found, expected, atol=2 / 5000, rtol=0)


def test_top_p_keeps_the_token_that_crosses_the_limit():
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    assert (draw_with_even_uniforms(logits, top_p=0.5) > 0).tolist() == [True, False, False]
    assert (draw_with_even_uniforms(logits, top_p=0.6) > 0).tolist() == [True, True, False]
    torch.testing.assert_close(
        draw_with_even_uniforms(logits, top_p=0.6), torch.tensor([0.625, 0.375, 0]), atol=1e-4, rtol=0
    )


def test_log_probs_are_of_the_whole_scaled_distribution():
    logits = torch.tensor([[1.0, 0.0, -1.0]])
    tokens, log_probs = sample(logits, 2.0, 1, 1.0, torch.tensor([0.9]))
    assert tokens.tolist() == [0]
    assert log_probs.item() == pytest.approx(-torch.tensor([0.0, -0.5, -1.0]).exp().sum().log().item())


def test_a_stop_token_ends_the_sequence_and_is_part_of_it(model):
    free = Request("free", [5, 6], SamplingParams(max_tokens=15, temperature=0.0))
    tokens = BatchedGenerator(model).generate([free])[0].token_ids
    stop = tokens[4]
    first = tokens.index(stop)
    stopped = Request("stopped", [5, 6], SamplingParams(max_tokens=15, temperature=0.0, stop_token_ids=(49, stop)))
    other, completion = BatchedGenerator(model).generate([free, stopped])
    assert completion.token_ids == tokens[: first + 1]
    assert completion.stop_reason == "completed"
    assert len(completion.log_probs) == first + 1
    assert other.token_ids == tokens


def test_equal_prompts_pass_the_model_once():
    model = make_model()
    shapes = count_forward_passes(model)
    prompts = [[1, 2, 3], [4, 5]]
    requests = [Request(str(i), prompts[i % 2], SamplingParams(max_tokens=2, seed=i)) for i in range(8)]
    BatchedGenerator(model).generate(requests)
    assert shapes == [(2, 3), (8, 1)]


def test_limits_of_the_batch_are_kept():
    model = make_model()
    shapes = count_forward_passes(model)
    requests = [Request(str(i), [i + 1] * 4, SamplingParams(max_tokens=1 + i, seed=i)) for i in range(6)]
    BatchedGenerator(model, max_num_seqs=4, max_num_batched_tokens=8).generate(requests)
    assert max(rows for rows, _ in shapes) <= 4
    assert max(rows * width for rows, width in shapes) <= 8
    assert sum(rows for rows, width in shapes if width > 1) == 6


def test_finished_sequences_leave_the_batch():
    model = make_model()
    shapes = count_forward_passes(model)
    requests = [Request(str(i), [1, 2], SamplingParams(max_tokens=2 if i % 2 else 9, seed=i)) for i in range(8)]
    BatchedGenerator(model).generate(requests)
    assert shapes == [(1, 2), (8, 1)] + [(4, 1)] * 7


def test_requests_that_come_later_do_not_wait_for_the_first_to_end(model):
    generator = BatchedGenerator(model)
    long, short = (Request(name, [1], SamplingParams(length)) for name, length in [("long", 50), ("short", 3)])
    generator.submit(long)
    generator.step()
    generator.submit(short)
    finished = [completion.request for _ in range(3) for completion in generator.step()]
    assert finished == [short]
    assert generator.unfinished == 1


def test_abort_returns_what_was_drawn(model):
    requests = make_requests(4, max_tokens=8)
    expected = BatchedGenerator(model).generate(requests)
    generator = BatchedGenerator(model, max_num_seqs=3)
    for request in requests:
        generator.submit(request)
    for _ in range(3):
        assert generator.step() == []
    aborted = {c.request: (c.stop_reason, c.token_ids) for c in generator.abort()}
    drawn = [*(each.token_ids[:3] for each in expected[:3]), []]
    assert aborted == {request: ("aborted", tokens) for request, tokens in zip(requests, drawn, strict=True)}
    assert generator.unfinished == 0


@pytest.mark.parametrize(
    "value",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -2},
        {"top_p": 0},
        {"top_p": 2},
    ],
)
def test_impossible_sampling_params_are_refused(value):
    (name,) = value
    with pytest.raises(ValueError, match=f"impossible sampling parameters.*{name}="):
        SamplingParams(**{"max_tokens": 1, **value})


@pytest.mark.parametrize(("prompt", "message"), [([], "the prompt is empty"), ([1, 50], "vocabulary is 0 to 49")])
def test_impossible_prompts_are_refused(model, prompt, message):
    with pytest.raises(ValueError, match=message):
        BatchedGenerator(model).submit(Request("x", prompt, SamplingParams(max_tokens=1)))


def test_a_diverged_model_is_an_error():
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(FloatingPointError, match="probably diverged"):
        BatchedGenerator(model).generate(make_requests(1))


def test_shared_keys_and_values_give_what_repeated_ones_give(monkeypatch):
    """With the CPU platform's rule for sdpa, no decoding step repeats keys, and the responses stay the same."""
    model, requests = make_model(), make_requests(12)
    repeated = BatchedGenerator(model).generate(requests)
    queries = []

    def repeat_kv(states, times):
        queries.append(states)
        return original(states, times)

    original = sdpa_attention.repeat_kv
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", sdpa_attention.use_gqa_in_sdpa)
    monkeypatch.setattr(sdpa_attention, "repeat_kv", repeat_kv)
    internals.share_keys_while_decoding()
    shared = BatchedGenerator(model).generate(requests)
    # Only for the prompts: keys and values of the two layers.
    assert len(queries) == 4
    for one, other in zip(repeated, shared, strict=True):
        assert one.token_ids == other.token_ids
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)
