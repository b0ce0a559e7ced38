"""Batched sampling from a transformers model with a key-value cache, reproducible per request.

Requests with the same sampling parameters form a batch and grow together. Finished sequences leave the batch, equal
prompts pass through the model once, and several batches take turns, so new requests do not wait for old ones to end.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel, TopKLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import Cache, DynamicLayer

# Maximum number of batches that take turns. With more, each forward pass would hold too few sequences.
MAX_BATCHES = 4
# Finished sequences are removed only when they are this fraction of a batch, because removal copies the cache.
FINISHED_FRACTION = 1 / 8


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one response are drawn.

    Args:
        max_tokens: maximum number of tokens to draw, at least 1.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: draw from the k most probable tokens; 0 or -1 for all.
        top_p: draw from the fewest tokens whose probabilities sum to this; 1 for all. Applied after `top_k`.
        stop_token_ids: tokens that end the response; they are part of it.
        seed: seed of the response's random numbers, which do not depend on the rest of the batch.

    Raises:
        ValueError: a value is out of its range.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        possible = self.max_tokens >= 1 and 0 <= self.temperature < float("inf")
        if not (possible and self.top_k >= -1 and 0 < self.top_p <= 1):
            raise ValueError(f"impossible sampling parameters: {self}")


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt to continue. Requests are compared by identity, so `request_id` may repeat."""

    request_id: str
    prompt_ids: Sequence[int]
    params: SamplingParams


@dataclass(frozen=True)
class Completion:
    """The result of a request.

    Attributes:
        token_ids: the tokens drawn, with the stop token if there was one.
        log_probs: natural log-probability of each under the temperature-scaled distribution over the whole vocabulary
            (before top-k and top-p), as the trainer computes it; at temperature 0, under the unscaled one.
        stop_reason: "completed" (stop token or length) or "aborted".
    """

    request: Request
    token_ids: list[int]
    log_probs: list[float]
    stop_reason: str


def sample(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws one token per row by inverting the cumulative distribution.

    Args:
        logits: (batch, vocabulary), any floating dtype.
        uniforms: (batch,) float32 random numbers in [0, 1).

    Returns:
        tokens (batch,) int64 and their log-probabilities (batch,) float32, see `Completion.log_probs`.
    """
    log_probs = (logits.float() / (temperature or 1.0)).log_softmax(dim=-1)
    if temperature == 0:
        tokens = log_probs.argmax(dim=-1, keepdim=True)
    else:
        kept = log_probs
        if top_k > 0:
            kept = TopKLogitsWarper(top_k)(None, kept)
        if top_p < 1:
            kept = TopPLogitsWarper(top_p)(None, kept)
        # float64: in float32 the sum over a large vocabulary would lose its improbable tokens.
        cumulative = kept.double().exp().cumsum(dim=-1)
        thresholds = uniforms.double().unsqueeze(1) * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, thresholds, right=True).clamp_(max=logits.shape[1] - 1)
    return tokens.squeeze(1), log_probs.gather(1, tokens).squeeze(1)


class _Layer(DynamicLayer):
    """Keys and values of one layer with room for all tokens: a new token is written in place, not concatenated."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.width = 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            rows, heads, _, size = key_states.shape
            self.keys = key_states.new_zeros(rows, heads, self.capacity, size)
            self.values = value_states.new_zeros(rows, heads, self.capacity, value_states.shape[-1])
        assert self.keys is not None
        assert self.values is not None
        start, self.width = self.width, self.width + key_states.shape[-2]
        self.keys[..., start : self.width, :] = key_states
        self.values[..., start : self.width, :] = value_states
        return self.keys[..., : self.width, :], self.values[..., : self.width, :]

    def get_seq_length(self) -> int:
        return self.width


class _Batch:
    """Sequences that started together. They are padded on the left, so that all grow at the same end."""

    def __init__(self, model: PreTrainedModel, requests: list[Request], pad_token_id: int) -> None:
        device, limits = model.device, [request.params.max_tokens for request in requests]
        self.model, self.requests, self.params = model, requests, requests[0].params
        prompts = list(dict.fromkeys(tuple(request.prompt_ids) for request in requests))
        self.width, longest = max(map(len, prompts)), max(limits)
        layers = model.config.get_text_config().num_hidden_layers
        self.cache = Cache(layers=[_Layer(self.width + longest) for _ in range(layers)])

        # One row per prompt, then one row per request.
        ids = torch.tensor([[pad_token_id] * (self.width - len(p)) + list(p) for p in prompts], device=device)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        # (batch, capacity): 0 where the row is padding, 1 where it holds a token or will.
        padding = (self.width - lengths).unsqueeze(1)
        self.mask = (torch.arange(self.width + longest, device=device) >= padding).long()
        positions = (self.mask[:, : self.width].cumsum(dim=1) - 1).clamp(min=0)
        logits = self._forward(ids, positions)
        row_of = {prompt: row for row, prompt in enumerate(prompts)}
        rows = torch.tensor([row_of[tuple(request.prompt_ids)] for request in requests], device=device)
        self.cache.batch_select_indices(rows)
        self.mask, self.lengths, self.logits = self.mask[rows], lengths[rows], logits[rows]

        # (batch, longest): what was drawn, and the random numbers to draw with. (batch,): the rest.
        self.count = 0
        self.tokens = torch.zeros(len(requests), longest, dtype=torch.long, device=device)
        self.log_probs = torch.zeros(len(requests), longest, device=device)
        self.uniforms = torch.stack([_uniforms(request.params, longest) for request in requests]).to(device)
        self.limits = torch.tensor(limits, device=device)
        self.running = torch.ones(len(requests), dtype=torch.bool, device=device)
        self.stop_token_ids = torch.tensor(self.params.stop_token_ids, dtype=torch.long, device=device)

    def __len__(self) -> int:
        return int(self.running.sum())

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits (batch, vocabulary) after the last of these tokens."""
        end = self.cache.get_seq_length() + ids.shape[1]
        output = self.model(
            input_ids=ids,
            attention_mask=self.mask[:, :end],
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def step(self) -> list[Completion]:
        """Draws one token for every sequence and returns those that ended.

        Raises:
            FloatingPointError: the model's logits are not finite.
        """
        if self.count:
            last = self.tokens[:, self.count - 1].unsqueeze(1)
            self.logits = self._forward(last, (self.lengths + self.count - 1).unsqueeze(1))
        p, uniforms = self.params, self.uniforms[:, self.count]
        tokens, log_probs = sample(self.logits, p.temperature, p.top_k, p.top_p, uniforms)
        if not log_probs.isfinite().all():
            raise FloatingPointError("the model's logits are not finite; its weights have probably diverged")
        self.tokens[:, self.count], self.log_probs[:, self.count] = tokens, log_probs
        self.count += 1
        return self.end(torch.isin(tokens, self.stop_token_ids) | (self.limits <= self.count), "completed")

    def end(self, rows: torch.Tensor, stop_reason: str) -> list[Completion]:
        """Ends the rows that are running among these, (batch,) bool."""
        rows = rows & self.running
        self.running &= ~rows
        completions = [
            Completion(
                self.requests[row],
                self.tokens[row, : self.count].tolist(),
                self.log_probs[row, : self.count].tolist(),
                stop_reason,
            )
            for row in rows.nonzero().flatten().tolist()
        ]
        if completions and 0 < len(self) <= (1 - FINISHED_FRACTION) * len(self.requests):
            self._select(self.running.nonzero().flatten())
        return completions

    def _select(self, rows: torch.Tensor) -> None:
        self.requests = [self.requests[row] for row in rows.tolist()]
        self.cache.batch_select_indices(rows)
        for name in ("mask", "lengths", "logits", "tokens", "log_probs", "uniforms", "limits", "running"):
            setattr(self, name, getattr(self, name)[rows])


class BatchedGenerator:
    """Continuous batching: `submit` at any time, `step` draws one token for every running sequence.

    Args:
        model: a causal language model with attention in all layers. Its weights may be changed between two steps.
        pad_token_id: filler on the left of shorter prompts; never attended to.
        max_num_seqs: maximum number of running sequences; further requests wait.
        max_num_batched_tokens: maximum number of prompt tokens, with padding, in one forward pass. A single prompt
            always fits.

    Raises:
        ValueError: the model keeps state other than keys and values.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pad_token_id: int = 0,
        max_num_seqs: int = 1024,
        max_num_batched_tokens: int = 8192,
    ) -> None:
        if getattr(model, "_is_stateful", False):
            raise ValueError(f"{type(model).__name__} keeps a recurrent state: only attention models can be batched")
        self.model = model.eval()
        self.pad_token_id = pad_token_id
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self._waiting: deque[Request] = deque()
        self._batches: list[_Batch] = []

    @property
    def unfinished(self) -> int:
        """Number of requests that run or wait."""
        return len(self._waiting) + sum(map(len, self._batches))

    def submit(self, request: Request) -> None:
        """Queues a request; may be called while another thread is in `step`.

        Raises:
            ValueError: the prompt is empty, or holds a token outside of the model's vocabulary.
        """
        ids, vocabulary = request.prompt_ids, self.model.get_input_embeddings().num_embeddings
        if not ids:
            raise ValueError(f"request {request.request_id}: the prompt is empty")
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            raise ValueError(
                f"request {request.request_id}: token ids from {min(ids)} to {max(ids)}, but the model's vocabulary "
                f"is 0 to {vocabulary - 1}"
            )
        self._waiting.append(request)

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Admits waiting requests, draws one token for every sequence and returns the finished ones.

        Raises:
            FloatingPointError: the model's logits are not finite. `abort` then leaves the generator usable.
        """
        while self._waiting and len(self._batches) < MAX_BATCHES and (requests := self._next_requests()):
            self._batches.append(_Batch(self.model, requests, self.pad_token_id))
        completions = [completion for batch in self._batches for completion in batch.step()]
        self._batches = [batch for batch in self._batches if len(batch)]
        return completions

    def _next_requests(self) -> list[Request]:
        """Takes from the queue what fits into one forward pass; equal prompts count once."""
        room = self.max_num_seqs - sum(map(len, self._batches))
        taken: list[Request] = []
        prompts: set[tuple[int, ...]] = set()
        while self._waiting and len(taken) < room:
            request = self._waiting[0]
            with_it = prompts | {tuple(request.prompt_ids)}
            too_many = len(with_it) * max(map(len, with_it)) > self.max_num_batched_tokens
            if taken and (too_many or not _may_share_a_batch(request.params, taken[0].params)):
                break
            prompts = with_it
            taken.append(self._waiting.popleft())
        return taken

    @torch.inference_mode()
    def abort(self) -> list[Completion]:
        """Ends all requests and returns what they have drawn so far."""
        # `submit` may append meanwhile, so the queue is never replaced.
        aborted = [Completion(self._waiting.popleft(), [], [], "aborted") for _ in range(len(self._waiting))]
        for batch in self._batches:
            aborted += batch.end(batch.running, "aborted")
        self._batches = []
        return aborted

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Runs requests to their end and returns their completions in the same order."""
        for request in requests:
            self.submit(request)
        completions: dict[Request, Completion] = {}
        while self.unfinished:
            completions.update((completion.request, completion) for completion in self.step())
        return [completions[request] for request in requests]


def _may_share_a_batch(a: SamplingParams, b: SamplingParams) -> bool:
    """Whether only their length limits and seeds differ."""
    return replace(a, max_tokens=1, seed=0) == replace(b, max_tokens=1, seed=0)


def _uniforms(params: SamplingParams, width: int) -> torch.Tensor:
    """The response's random numbers in [0, 1), (width,) float32 on the CPU: the same in every batch."""
    generator = torch.Generator(device="cpu").manual_seed(params.seed)
    drawn = torch.rand(params.max_tokens, generator=generator, device="cpu")
    return torch.nn.functional.pad(drawn, (0, width - params.max_tokens))
