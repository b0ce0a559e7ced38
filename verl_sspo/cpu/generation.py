"""Batched sampling from a transformers model, with a key-value cache and sequences that come and go.

Sequences are padded on the left, so that all of them grow at the same end; those that finish leave the batch at once,
and new ones join at any step. Between two tokens there is no Python per sequence and one transfer to the host.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one sequence are drawn.

    Args:
        max_tokens: tokens to draw at most, at least 1.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: draw from the k most probable tokens; 0 or -1 from all.
        top_p: draw from the fewest tokens whose probabilities sum to this; 1 from all. Applied after `top_k`.
        stop_token_ids: tokens that end the sequence; they are part of it.
        seed: of the sequence's own random numbers, which do not depend on what else is in the batch.

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
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and at least 0, got {self.temperature}")
        if self.top_k < -1:
            raise ValueError(f"top_k must be at least 1, or 0 or -1 for all tokens, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")


@dataclass(frozen=True)
class Request:
    request_id: str
    prompt_ids: Sequence[int]
    params: SamplingParams


@dataclass(frozen=True)
class Completion:
    """What became of a request.

    Attributes:
        token_ids: the tokens drawn, with the stop token if there was one.
        log_probs: natural log-probability of each under the temperature-scaled distribution over the whole vocabulary
            (before top-k and top-p), as the trainer computes it; at temperature 0, under the unscaled one.
        stop_reason: "completed" (stop token or length) or "aborted".
        error: why the request failed; token_ids and log_probs are then empty.
    """

    request_id: str
    token_ids: list[int]
    log_probs: list[float]
    stop_reason: str
    error: Exception | None = None


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    uniforms: torch.Tensor,
    truncate: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws one token a row by inverting the cumulative distribution, in the vocabulary's order.

    Args:
        logits: (batch, vocabulary), any floating dtype.
        temperature: (batch,), 0 for the most probable token.
        top_k: (batch,), below 1 for all tokens.
        top_p: (batch,).
        uniforms: (batch,), in [0, 1).
        truncate: False skips top-k and top-p, for a batch in which no row has any.

    Returns:
        tokens (batch,) int64 and their log-probabilities (batch,) float32, see `Completion.log_probs`. Where the logits
        are not finite, the log-probability is not finite either and the token is only some valid one.
    """
    greedy = temperature == 0
    scaled = logits.float() / torch.where(greedy, 1.0, temperature).unsqueeze(1)
    log_probs = scaled.log_softmax(dim=-1)
    # float64: the sum over a large vocabulary would otherwise lose its improbable tokens.
    weights = log_probs.double().exp()
    if truncate:
        weights = _truncate(weights, top_k, top_p)
    cumulative = weights.cumsum(dim=-1)
    thresholds = uniforms.double().unsqueeze(1) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, thresholds, right=True).clamp_(max=logits.shape[1] - 1)
    tokens = torch.where(greedy.unsqueeze(1), log_probs.argmax(dim=-1, keepdim=True), drawn)
    return tokens.squeeze(1), log_probs.gather(1, tokens).squeeze(1)


def _truncate(weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Sets the (batch, vocabulary) probabilities outside of top-k, then top-p, to 0, without renormalising."""
    descending, order = weights.sort(dim=-1, descending=True)
    rank = torch.arange(weights.shape[1], device=weights.device)
    descending = descending * ((rank < top_k.unsqueeze(1)) | (top_k < 1).unsqueeze(1))
    before = descending.cumsum(dim=-1) - descending
    keep = (before < top_p.unsqueeze(1) * descending.sum(dim=-1, keepdim=True)) | (top_p >= 1).unsqueeze(1)
    return torch.zeros_like(weights).scatter(1, order, descending * keep)


class _Layer(DynamicLayer):
    """Keys and values of one layer, with room on the right: a token is written, not concatenated to a copy of all."""

    def __init__(self, storage: Sequence[torch.Tensor] = (), width: int = 0) -> None:
        super().__init__()
        # Keys and values, each (batch, heads, at least width, head size); empty before the first forward pass.
        self.storage = list(storage)
        self.width = width

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        end = self.width + key_states.shape[-2]
        if not self.storage:
            self.storage = [key_states, value_states]
        else:
            if self.storage[0].shape[-2] < end:
                self.storage = [torch.nn.functional.pad(x, (0, 0, 0, end + _ROOM - x.shape[-2])) for x in self.storage]
            for stored, new in zip(self.storage, (key_states, value_states), strict=True):
                stored[..., self.width : end, :] = new
        self.width = end
        return tuple(self.contents())

    def contents(self) -> list[torch.Tensor]:
        return [x[..., : self.width, :] for x in self.storage]

    def get_seq_length(self) -> int:
        return self.width


# Tokens that a layer makes room for at a time.
_ROOM = 64


class _KeyValues(Cache):
    """Keys and values of all layers, as transformers passes them through a model."""

    def __init__(self, own_layers: list[_Layer]) -> None:
        super().__init__(layers=[*own_layers])
        self.own_layers = own_layers

    def select(self, rows: torch.Tensor, first: int = 0) -> "_KeyValues":
        """These rows, from column `first` on."""
        return _KeyValues(
            [
                _Layer([x.index_select(0, rows)[..., first:, :] for x in layer.storage], layer.width - first)
                for layer in self.own_layers
            ]
        )

    def join(self, other: "_KeyValues", width: int) -> "_KeyValues":
        """Rows of both, zeros on the left up to `width` columns."""
        return _KeyValues(
            [
                _Layer([_stack_left(x, y, width, -2) for x, y in zip(a.contents(), b.contents(), strict=True)], width)
                for a, b in zip(self.own_layers, other.own_layers, strict=True)
            ]
        )


@dataclass
class _Batch:
    """Sequences that grow together; every tensor has one row a sequence."""

    requests: list[Request]
    # Keys and values of all tokens but the last one drawn; in each layer (batch, heads, width, head size).
    cache: _KeyValues
    # (batch, width) of 0 and 1: 1 where the cache holds a token of the sequence, 0 at the padding on its left.
    mask: torch.Tensor
    # (batch,) tokens drawn so far.
    counts: torch.Tensor
    # (batch, longest limit): what was drawn, and what to draw with.
    tokens: torch.Tensor
    log_probs: torch.Tensor
    uniforms: torch.Tensor
    # (batch,) limits and options; (batch, most stop tokens), filled up with -1.
    limits: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    stop_token_ids: torch.Tensor

    def __post_init__(self) -> None:
        self.truncate = any(r.params.top_k > 0 or r.params.top_p < 1 for r in self.requests)

    def __len__(self) -> int:
        return len(self.requests)

    def select(self, rows: list[int]) -> "_Batch":
        """The batch with these rows only, without the columns that are padding in all of them."""
        index = torch.tensor(rows, device=self.mask.device)
        mask = self.mask[index]
        first = int(mask.any(dim=0).int().argmax())
        fields = {name: getattr(self, name)[index] for name in _ROW_FIELDS}
        requests = [self.requests[row] for row in rows]
        return _Batch(requests=requests, cache=self.cache.select(index, first), mask=mask[:, first:], **fields)

    def join(self, other: "_Batch") -> "_Batch":
        width = max(self.mask.shape[1], other.mask.shape[1])
        fields = {name: _stack(getattr(self, name), getattr(other, name)) for name in _ROW_FIELDS}
        return _Batch(
            requests=self.requests + other.requests,
            cache=self.cache.join(other.cache, width),
            mask=_stack_left(self.mask, other.mask, width, -1),
            **fields,
        )


_ROW_FIELDS = (
    "counts",
    "tokens",
    "log_probs",
    "uniforms",
    "limits",
    "temperature",
    "top_k",
    "top_p",
    "stop_token_ids",
)


def _stack_left(a: torch.Tensor, b: torch.Tensor, width: int, dim: int) -> torch.Tensor:
    """Rows of both, zeros added on the left of dimension `dim` up to `width`."""

    def pad(x: torch.Tensor) -> torch.Tensor:
        missing = width - x.shape[dim]
        return torch.nn.functional.pad(x, (missing, 0) if dim == -1 else (0, 0, missing, 0)) if missing else x

    return torch.cat([pad(a), pad(b)])


def _stack(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Rows of both; two-dimensional ones are filled up with -1 on the right, which is no token."""
    if a.dim() == 2:
        width = max(a.shape[1], b.shape[1])
        a, b = (torch.nn.functional.pad(x, (0, width - x.shape[1]), value=-1) for x in (a, b))
    return torch.cat([a, b])


class BatchedGenerator:
    """Continuous batching: `submit` any time, `step` draws one token for every sequence of the batch.

    Args:
        model: a causal language model with attention in all layers; used in evaluation mode as it is, so its weights
            may be changed between two steps.
        pad_token_id: filler on the left of shorter prompts; never attended to.
        max_num_seqs: sequences in the batch at most; more wait.
        max_num_batched_tokens: prompt tokens, padding included, in one forward pass at most (one prompt always fits).

    Raises:
        ValueError: the model keeps another state than keys and values.
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
        self._batch: _Batch | None = None

    @property
    def unfinished(self) -> int:
        """Sequences in the batch and waiting for it."""
        return len(self._waiting) + (len(self._batch) if self._batch else 0)

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises:
            ValueError: the prompt is empty, or holds a token outside of the model's vocabulary.
        """
        if not request.prompt_ids:
            raise ValueError(f"request {request.request_id}: the prompt is empty")
        vocabulary = self.model.get_input_embeddings().num_embeddings
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < vocabulary:
            raise ValueError(
                f"request {request.request_id}: token ids from {min(request.prompt_ids)} to {max(request.prompt_ids)}, "
                f"but the model's vocabulary is 0 to {vocabulary - 1}"
            )
        self._waiting.append(request)

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Lets waiting requests in, draws one token for every sequence and returns those that are finished."""
        finished: list[Completion] = []
        if self._batch:
            running = self._batch
            self._batch, finished = self._draw(running, self._decode(running))
        while self._waiting and (room := self.max_num_seqs - (len(self._batch) if self._batch else 0)) > 0:
            arrived, logits = self._prefill(self._next_prompts(room))
            joining, at_once = self._draw(arrived, logits)
            finished += at_once
            if joining:
                self._batch = self._batch.join(joining) if self._batch else joining
        return finished

    def abort(self, request_ids: Iterable[str] | None = None) -> list[Completion]:
        """Ends requests, all of them by default, and returns what they have drawn so far."""
        ending = None if request_ids is None else set(request_ids)

        def is_ending(request: Request) -> bool:
            return ending is None or request.request_id in ending

        aborted = [Completion(r.request_id, [], [], "aborted") for r in self._waiting if is_ending(r)]
        self._waiting = deque(r for r in self._waiting if not is_ending(r))
        if self._batch:
            rows = [row for row, request in enumerate(self._batch.requests) if is_ending(request)]
            aborted += self._complete(self._batch, rows, "aborted")
            kept = [row for row, request in enumerate(self._batch.requests) if not is_ending(request)]
            self._batch = self._batch.select(kept) if kept else None
        return aborted

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Runs requests to their end, in their order, on a generator that has nothing else to do.

        Raises:
            RuntimeError: the generator has unfinished requests.
        """
        if self.unfinished:
            raise RuntimeError("generate needs an idle generator: this one has unfinished requests")
        if len({request.request_id for request in requests}) != len(requests):
            raise ValueError("generate needs requests with different request_id")
        for request in requests:
            self.submit(request)
        completions: dict[str, Completion] = {}
        while self.unfinished:
            completions.update((completion.request_id, completion) for completion in self.step())
        return [completions[request.request_id] for request in requests]

    def _next_prompts(self, room: int) -> list[Request]:
        """Takes from the queue what fits into one forward pass; equal prompts pass once."""
        taken: list[Request] = []
        prompts: set[tuple[int, ...]] = set()
        longest = 0
        while self._waiting and len(taken) < room:
            prompt = tuple(self._waiting[0].prompt_ids)
            padded = len(prompts | {prompt}) * max(longest, len(prompt)) if prompt not in prompts else 0
            if taken and padded > self.max_num_batched_tokens:
                break
            prompts.add(prompt)
            longest = max(longest, len(prompt))
            taken.append(self._waiting.popleft())
        return taken

    def _prefill(self, requests: list[Request]) -> tuple[_Batch, torch.Tensor]:
        """The batch of new requests, with the logits (batch, vocabulary) of their first tokens."""
        device = self.model.device
        prompts = list(dict.fromkeys(tuple(request.prompt_ids) for request in requests))
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad_token_id] * (width - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        cache = _KeyValues([_Layer() for _ in range(self.model.config.get_text_config().num_hidden_layers)])
        logits = self._forward(ids, mask, (mask.cumsum(dim=-1) - 1).clamp(min=0), cache)

        params = [request.params for request in requests]
        longest = max(p.max_tokens for p in params)
        most_stops = max(len(p.stop_token_ids) for p in params)
        batch = _Batch(
            requests=requests,
            cache=cache,
            mask=mask,
            counts=torch.zeros(len(requests), dtype=torch.long, device=device),
            tokens=torch.full((len(requests), longest), -1, device=device),
            log_probs=torch.zeros(len(requests), longest, device=device),
            uniforms=torch.stack([_uniforms(p, longest) for p in params]).to(device),
            limits=torch.tensor([p.max_tokens for p in params], device=device),
            temperature=torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device),
            top_k=torch.tensor([p.top_k for p in params], device=device),
            top_p=torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device),
            stop_token_ids=torch.tensor(
                [[*p.stop_token_ids] + [-1] * (most_stops - len(p.stop_token_ids)) for p in params],
                dtype=torch.long,
                device=device,
            ),
        )
        if len(prompts) < len(requests):
            row_of = {prompt: row for row, prompt in enumerate(prompts)}
            rows = torch.tensor([row_of[tuple(request.prompt_ids)] for request in requests], device=device)
            batch.cache = cache.select(rows)
            batch.mask = mask[rows]
            logits = logits[rows]
        return batch, logits

    def _decode(self, batch: _Batch) -> torch.Tensor:
        """Logits (batch, vocabulary) after the token drawn last."""
        last = batch.tokens.gather(1, batch.counts.unsqueeze(1) - 1)
        positions = batch.mask.sum(dim=-1, keepdim=True)
        batch.mask = torch.nn.functional.pad(batch.mask, (0, 1), value=1)
        return self._forward(last, batch.mask, positions, batch.cache)

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: _KeyValues
    ) -> torch.Tensor:
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def _draw(self, batch: _Batch, logits: torch.Tensor) -> tuple[_Batch | None, list[Completion]]:
        """Draws a token for every sequence; returns the batch of those that go on, and the others."""
        at = batch.counts.unsqueeze(1)
        tokens, log_probs = sample(
            logits,
            batch.temperature,
            batch.top_k,
            batch.top_p,
            batch.uniforms.gather(1, at).squeeze(1),
            truncate=batch.truncate,
        )
        batch.tokens.scatter_(1, at, tokens.unsqueeze(1))
        batch.log_probs.scatter_(1, at, log_probs.unsqueeze(1))
        batch.counts += 1
        stopped = (batch.stop_token_ids == tokens.unsqueeze(1)).any(dim=-1)
        done = stopped | (batch.counts >= batch.limits) | ~log_probs.isfinite()
        # The one transfer to the host.
        flags = done.tolist()
        if not any(flags):
            return batch, []
        finished = self._complete(batch, [row for row, flag in enumerate(flags) if flag], "completed")
        going_on = [row for row, flag in enumerate(flags) if not flag]
        return (batch.select(going_on) if going_on else None), finished

    def _complete(self, batch: _Batch, rows: list[int], stop_reason: str) -> list[Completion]:
        index = torch.tensor(rows, dtype=torch.long, device=batch.tokens.device)
        counts = batch.counts[index].tolist()
        tokens, log_probs = batch.tokens[index].tolist(), batch.log_probs[index].tolist()
        finite = batch.log_probs[index].isfinite().all(dim=-1).tolist()
        completions = []
        for i, row in enumerate(rows):
            request_id = batch.requests[row].request_id
            if finite[i]:
                drawn = slice(0, counts[i])
                completions.append(Completion(request_id, tokens[i][drawn], log_probs[i][drawn], stop_reason))
            else:
                error = FloatingPointError(
                    f"request {request_id}: the model's logits are not finite after {counts[i] - 1} tokens; "
                    "its weights have probably diverged"
                )
                completions.append(Completion(request_id, [], [], "error", error))
        return completions


def _uniforms(params: SamplingParams, width: int) -> torch.Tensor:
    """The sequence's random numbers in [0, 1), (width,) float32, the same in every batch."""
    drawn = torch.rand(params.max_tokens, generator=torch.Generator().manual_seed(params.seed))
    return torch.nn.functional.pad(drawn, (0, width - params.max_tokens), value=-1)
