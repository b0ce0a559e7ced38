"""Batched sampling against transformers' own generate, forward pass and logits processors."""

import asyncio
import threading
from concurrent.futures import wait

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

from verl_sspo.cpu.generation import BatchedGenerator, Request, SamplingParams, sample
from verl_sspo.cpu.serving import GenerationThread

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
    """A list that grows by the input's shape with every forward pass."""
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
        completions.update((c.request_id, c) for c in generator.step())
    while generator.unfinished:
        completions.update((c.request_id, c) for c in generator.step())
    assert completions.keys() == {request.request_id for request in requests}
    for request in requests:
        completion = completions[request.request_id]
        assert len(completion.token_ids) == request.params.max_tokens
        torch.testing.assert_close(
            torch.tensor(completion.log_probs),
            log_probs_by_forward_pass(model, request, completion.token_ids, temperature=0.7),
            atol=1e-5,
            rtol=1e-5,  # float32, divided by the temperature: which kernels a CPU has shows in the last digits
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


def test_other_seeds_draw_other_tokens(model):
    prompt = [1, 2, 3]
    requests = [Request(str(i), prompt, SamplingParams(max_tokens=12, temperature=2.0, seed=i)) for i in range(20)]
    assert len({tuple(c.token_ids) for c in BatchedGenerator(model).generate(requests)}) == 20


def draw_with_even_uniforms(logits, temperature=1.0, top_k=-1, top_p=1.0, count=20_000) -> torch.Tensor:
    """Frequencies (vocabulary,) of the tokens drawn with `count` evenly spaced random numbers."""
    rows = torch.ones(count)
    tokens, _ = sample(
        logits.expand(count, -1),
        temperature * rows,
        (top_k * rows).long(),
        (top_p * rows).double(),
        (torch.arange(count) + 0.5) / count,
    )
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
    # At most one draw more or less at each end of a token's interval.
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
    tokens, log_probs = sample(
        logits, torch.tensor([2.0]), torch.tensor([1]), torch.tensor([1.0]).double(), torch.tensor([0.9])
    )
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


def test_limits_of_the_batch_are_kept_and_finished_sequences_leave_it():
    model = make_model()
    shapes = count_forward_passes(model)
    requests = [Request(str(i), [i + 1] * 4, SamplingParams(max_tokens=1 + i, seed=i)) for i in range(6)]
    BatchedGenerator(model, max_num_seqs=4, max_num_batched_tokens=8).generate(requests)
    assert max(rows for rows, _ in shapes) <= 4
    assert max(rows * width for rows, width in shapes) <= 8
    # Each sequence passes once for its prompt and once for each of its tokens but the last.
    assert sum(rows for rows, width in shapes if width == 1) == 0 + 1 + 2 + 3 + 4 + 5
    assert sum(rows for rows, width in shapes if width > 1) == 6


def test_abort_returns_what_was_drawn_and_leaves_the_others_alone(model):
    requests = make_requests(4, max_tokens=8)
    expected = BatchedGenerator(model).generate(requests)
    generator = BatchedGenerator(model, max_num_seqs=3)
    for request in requests:
        generator.submit(request)
    for _ in range(3):
        assert generator.step() == []
    running, waiting = sorted(
        generator.abort([requests[1].request_id, requests[3].request_id]), key=lambda c: c.request_id
    )
    assert (running.stop_reason, running.token_ids) == ("aborted", expected[1].token_ids[:3])
    assert (waiting.stop_reason, waiting.token_ids) == ("aborted", [])
    finished = {}
    while generator.unfinished:
        finished.update((c.request_id, c.token_ids) for c in generator.step())
    assert finished == {requests[i].request_id: expected[i].token_ids for i in (0, 2)}


def test_abort_of_all_leaves_the_generator_idle(model):
    generator = BatchedGenerator(model)
    for request in make_requests(3, max_tokens=9):
        generator.submit(request)
    generator.step()
    assert len(generator.abort()) == 3
    assert generator.unfinished == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"temperature": -0.1}, "temperature must be finite"),
        ({"temperature": float("nan")}, "temperature must be finite"),
        ({"top_k": -2}, "top_k must be"),
        ({"top_p": 0.0}, "top_p must be"),
        ({"top_p": 1.1}, "top_p must be"),
    ],
)
def test_impossible_sampling_params_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**{"max_tokens": 1, **values})


@pytest.mark.parametrize(("prompt", "message"), [([], "the prompt is empty"), ([1, 50], "vocabulary is 0 to 49")])
def test_impossible_prompts_are_refused(model, prompt, message):
    with pytest.raises(ValueError, match=message):
        BatchedGenerator(model).submit(Request("x", prompt, SamplingParams(max_tokens=1)))


def test_a_diverged_model_is_an_error_of_the_request():
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    (completion,) = BatchedGenerator(model).generate(make_requests(1))
    assert isinstance(completion.error, FloatingPointError)


@pytest.fixture
def thread(model):
    thread = GenerationThread(BatchedGenerator(model))
    yield thread
    thread.close()


def test_concurrent_requests_share_one_batch():
    model = make_model()
    shapes = count_forward_passes(model)
    thread = GenerationThread(BatchedGenerator(model))
    requests = [Request(str(i), [i + 1], SamplingParams(max_tokens=3, seed=i)) for i in range(16)]

    async def request_all():
        return await asyncio.gather(*[asyncio.wrap_future(thread.submit(request)) for request in requests])

    completions = asyncio.run(request_all())
    thread.close()
    assert [c.request_id for c in completions] == [r.request_id for r in requests]
    assert shapes == [(16, 1)] * 3


def test_a_bad_request_fails_alone(thread):
    good = thread.submit(Request("good", [1], SamplingParams(max_tokens=3)))
    bad = thread.submit(Request("bad", [VOCABULARY], SamplingParams(max_tokens=3)))
    with pytest.raises(ValueError, match="vocabulary"):
        bad.result(timeout=30)
    assert len(good.result(timeout=30).token_ids) == 3


def test_an_exception_of_the_model_reaches_all_and_the_thread_goes_on(thread, model):
    def fail(*_):
        raise MemoryError("no memory left")

    hook = model.register_forward_pre_hook(fail)
    futures = [thread.submit(request) for request in make_requests(3)]
    wait(futures, timeout=30)
    hook.remove()
    assert [str(future.exception()) for future in futures] == ["no memory left"] * 3
    assert thread.submit(make_requests(1)[0]).result(timeout=30).stop_reason == "completed"


def test_a_cancelled_request_does_not_fail_its_neighbours(thread, model):
    started, go_on = threading.Event(), threading.Event()

    def hold(*_):
        started.set()
        go_on.wait(timeout=30)

    hook = model.register_forward_pre_hook(hold)
    running = [thread.submit(request) for request in make_requests(2)]
    assert started.wait(timeout=30)
    waiting = thread.submit(Request("waiting", [1], SamplingParams(max_tokens=3)))
    assert waiting.cancel()
    assert not running[0].cancel()
    go_on.set()
    hook.remove()
    assert {future.result(timeout=30).stop_reason for future in running} == {"completed"}
    assert thread.submit(Request("next", [1], SamplingParams(max_tokens=3))).result(timeout=30).error is None


def test_requests_can_be_aborted_while_they_run(thread, model):
    started = threading.Event()
    hook = model.register_forward_pre_hook(lambda *_: started.set())
    future = thread.submit(Request("long", [1], SamplingParams(max_tokens=100_000)))
    assert started.wait(timeout=30)
    assert thread.abort().result(timeout=30) == ["long"]
    hook.remove()
    completion = future.result(timeout=30)
    assert completion.stop_reason == "aborted"
    assert 0 < len(completion.token_ids) == len(completion.log_probs) < 100_000


def test_closing_aborts_what_is_unfinished(model):
    thread = GenerationThread(BatchedGenerator(model))
    future = thread.submit(Request("long", [1], SamplingParams(max_tokens=100_000)))
    thread.close()
    assert future.result(timeout=30).stop_reason == "aborted"
    with pytest.raises(RuntimeError, match="closed"):
        thread.submit(Request("late", [1], SamplingParams(max_tokens=1)))
