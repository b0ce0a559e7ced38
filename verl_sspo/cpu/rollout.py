"""The rollout engine `hf`: verl's replica, server and trainer-side adapter around a transformers model.

One replica is one Ray actor with one copy of the model, one for each trainer rank. It takes tokens and returns tokens;
there is no HTTP endpoint.
"""

import asyncio
import hashlib
import itertools
import os
from array import array
from collections import Counter
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, PreTrainedModel
from verl.utils import normalize_token_ids
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.config import HFModelConfig, RolloutConfig
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutMode, RolloutReplica, TokenOutput
from verl.workers.rollout.utils import ensure_async_iterator

from verl_sspo.cpu.generation import BatchedGenerator, Completion, Request, SamplingParams
from verl_sspo.cpu.serving import GenerationThread


def server_name(replica_rank: int) -> str:
    """Name of the Ray actor: how a trainer rank finds its server."""
    return f"hf_server_{replica_rank}_0"


def check_rollout_config(config: RolloutConfig) -> None:
    """Raises ValueError for what the engine cannot do."""
    size = config.tensor_model_parallel_size * config.data_parallel_size * config.pipeline_model_parallel_size
    if size != 1:
        raise ValueError(
            f"the rollout `hf` holds the whole model in one process, but its replica would span {size}: set tensor_, "
            "data_ and pipeline_model_parallel_size of actor_rollout_ref.rollout to 1"
        )


class HFServer:
    """Ray actor with the model: generates, and takes new weights."""

    def __init__(
        self,
        config: Any,
        model_config: Any,
        rollout_mode: RolloutMode,
        replica_rank: int,
    ) -> None:
        """Takes `config` and `model_config` as verl's dataclasses or as the DictConfig they are made from."""
        self.config: RolloutConfig = omega_conf_to_dataclass(config)
        self.model_config: HFModelConfig = omega_conf_to_dataclass(model_config, dataclass_type=HFModelConfig)
        self.rollout_mode = rollout_mode
        self.replica_rank = replica_rank
        # Version of the weights, set by the trainer with each update.
        self.global_steps: int | None = None

        hf_config = self.model_config.hf_config
        self.max_model_len = self.config.max_model_len or hf_config.get_text_config().max_position_embeddings
        self.model, self.has_weights = self._load_model()
        self.eos_token_ids = self._eos_token_ids()
        self.generation = GenerationThread(
            BatchedGenerator(
                self.model,
                pad_token_id=self.model_config.tokenizer.pad_token_id or 0,
                max_num_seqs=self.config.max_num_seqs,
                max_num_batched_tokens=self.config.max_num_batched_tokens,
            )
        )
        # How often each prompt was asked for since the last update of the weights: see `_seed`.
        self._asked: Counter[tuple[int, ...]] = Counter()

        # Requests wait here while generation is paused or the engine asleep.
        self._paused = self._asleep = self._rejecting = False
        self._admitting = asyncio.Event()
        self._admitting.set()
        # verl's request id by the engine's. verl's need not be unique: full_determinism repeats them.
        self._in_flight: dict[str, str] = {}
        self._numbers = itertools.count()
        self._drained = asyncio.Event()
        self._drained.set()

    def _load_model(self) -> tuple[PreTrainedModel, bool]:
        """The model, and whether its weights are more than random numbers."""
        options: dict[str, Any] = dict(
            dtype=PrecisionType.to_dtype(self.config.dtype), trust_remote_code=self.model_config.trust_remote_code
        )
        hf_config = self.model_config.hf_config
        if self.config.load_format == "dummy":
            return AutoModelForCausalLM.from_config(hf_config, **options), False
        return AutoModelForCausalLM.from_pretrained(
            str(self.model_config.local_path), config=hf_config, **options
        ), True

    def _eos_token_ids(self) -> tuple[int, ...]:
        """The tokenizer's end of sequence and the model's, of which there may be several."""
        declared = getattr(self.model_config.generation_config, "eos_token_id", None)
        declared = declared if isinstance(declared, list) else [declared]
        ids = [self.model_config.tokenizer.eos_token_id, *declared]
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    async def generate(
        self,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        request_id: str,
        image_data: list[Any] | None = None,
        video_data: list[Any] | None = None,
        audio_data: list[Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
    ) -> TokenOutput:
        """Tokens in, tokens out.

        Raises:
            ValueError: the request is not possible, with the reason.
            RuntimeError: no weights have arrived yet.
        """
        if image_data or video_data or audio_data:
            raise ValueError("the rollout `hf` generates from text only, but the request holds images, video or audio")
        prompt_ids = normalize_token_ids(prompt_ids)
        while not self._admitting.is_set():
            if self._rejecting:
                return self._to_output(Completion(request_id, [], [], "aborted"))
            await self._admitting.wait()
        if not self.has_weights:
            raise RuntimeError("the rollout `hf` has no weights yet: rollout.load_format=dummy waits for the trainer's")

        params = self._to_sampling_params(prompt_ids, dict(sampling_params))
        own_id = f"{request_id}#{next(self._numbers)}"
        self._in_flight[own_id] = request_id
        self._drained.clear()
        try:
            request = Request(own_id, prompt_ids, params)
            completion = await asyncio.wrap_future(self.generation.submit(request))
        finally:
            del self._in_flight[own_id]
            if not self._in_flight:
                self._drained.set()
        return self._to_output(completion)

    def _to_sampling_params(self, prompt_ids: list[int], params: dict[str, Any]) -> SamplingParams:
        """verl's dictionary, in the names of vLLM or SGLang, as this engine's."""
        room = self.max_model_len - len(prompt_ids)
        if room < 1:
            raise ValueError(
                f"a prompt of {len(prompt_ids)} tokens leaves no room in the context of {self.max_model_len} "
                "(rollout.max_model_len, or the model's max_position_embeddings)"
            )
        # As verl's vLLM server: without a limit, what is left of prompt_length + response_length.
        default = min(
            self.config.response_length, self.config.prompt_length + self.config.response_length - len(prompt_ids)
        )
        limits = [params.pop("max_new_tokens", None), params.pop("max_tokens", None)]
        max_tokens = next((limit for limit in reversed(limits) if limit is not None), default)
        stop_token_ids = tuple(params.pop("stop_token_ids", None) or ())
        if not params.pop("ignore_eos", self.config.ignore_eos):
            stop_token_ids += self.eos_token_ids
        # Log-probabilities cost nothing here and are always returned.
        params.pop("logprobs", None)
        sampling_params = SamplingParams(
            max_tokens=max(1, min(max_tokens, room)),
            temperature=float(params.pop("temperature", self.config.temperature)),
            top_k=int(params.pop("top_k", self.config.top_k)),
            top_p=float(params.pop("top_p", self.config.top_p)),
            stop_token_ids=stop_token_ids,
            seed=self._seed(prompt_ids, params.pop("seed", self.config.seed)),
        )
        if params.pop("repetition_penalty", self.config.repetition_penalty) != 1.0:
            raise ValueError("the rollout `hf` has no repetition_penalty: leave it at 1.0")
        if params:
            raise ValueError(f"the rollout `hf` does not know these sampling parameters: {', '.join(sorted(params))}")
        return sampling_params

    def _seed(self, prompt_ids: list[int], seed: int) -> int:
        """A seed for the k-th request with this prompt since the last update of the weights.

        The samples of one prompt are interchangeable, so a run can be repeated whatever the order in which concurrent
        requests arrive.
        """
        prompt = tuple(prompt_ids)
        key = (seed, self.replica_rank, self.global_steps or 0, self._asked[prompt])
        self._asked[prompt] += 1
        digest = hashlib.blake2b(array("q", [*key, *prompt]).tobytes(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def _to_output(self, completion: Completion) -> TokenOutput:
        return TokenOutput(
            token_ids=completion.token_ids,
            log_probs=completion.log_probs,
            stop_reason=completion.stop_reason,
            extra_fields={"global_steps": self.global_steps},
        )

    async def update_weights(self, weights: dict[str, torch.Tensor]) -> list[str]:
        """Copies these parameters into the model and returns their names.

        Raises:
            ValueError: a name or shape that the model does not have.
        """

        @torch.no_grad()
        def copy() -> list[str]:
            own = self.model.state_dict(keep_vars=True)
            for name, weight in weights.items():
                if name not in own or own[name].shape != weight.shape:
                    found = f"with shape {tuple(own[name].shape)}" if name in own else "nothing of that name"
                    raise ValueError(
                        f"the trainer sends {name} with shape {tuple(weight.shape)}, the rollout's model has {found}"
                    )
                own[name].copy_(weight)
            return list(weights)

        return await asyncio.wrap_future(self.generation.run_between_steps(copy))

    async def finish_update(self, received: list[str], global_steps: int | None) -> None:
        """Makes the weights valid after the last `update_weights`.

        Raises:
            ValueError: a parameter has not come.
        """
        # Of tied parameters one name is enough.
        shared = {tensor.data_ptr() for name, tensor in self.model.state_dict().items() if name in set(received)}
        missing = [name for name, parameter in self.model.named_parameters() if parameter.data_ptr() not in shared]
        if missing:
            raise ValueError(f"the trainer's weights lack {', '.join(missing)}")
        self.has_weights = True
        self.global_steps = global_steps
        self._asked.clear()

    async def wait_for_requests_to_drain(self) -> None:
        await self._drained.wait()

    async def sleep(self) -> None:
        """New requests wait until `wake_up`. Nothing is freed: the engine keeps no cache between requests."""
        if self.config.free_cache_engine and self.rollout_mode != RolloutMode.STANDALONE:
            self._asleep = True
            self._update_gate()

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """Ends `sleep`; with only some of the parts in `tags`, when the cache is among them."""
        if tags is None or "kv_cache" in tags:
            self._asleep = False
            self._update_gate()

    async def abort_all_requests(self, reject_request: bool = False) -> dict[str, Any]:
        """Ends all requests with what they have; later ones wait for `resume_generation`, or are rejected."""
        self._paused, self._rejecting = True, reject_request
        self._update_gate()
        aborted = await asyncio.wrap_future(self.generation.abort())
        # Requests that were waiting at the gate learn that it now rejects.
        if reject_request:
            self._admitting.set()
            self._admitting.clear()
        return {"aborted_count": len(aborted), "request_ids": [own_id.rpartition("#")[0] for own_id in aborted]}

    async def abort_request(self, request_id: str) -> dict[str, Any]:
        own_ids = [own_id for own_id, verl_id in self._in_flight.items() if verl_id == request_id]
        aborted = await asyncio.wrap_future(self.generation.abort(own_ids))
        return {"aborted": bool(aborted), "request_id": request_id}

    async def resume_generation(self) -> None:
        self._paused = self._rejecting = False
        self._update_gate()

    def _update_gate(self) -> None:
        if self._paused or self._asleep:
            self._admitting.clear()
        else:
            self._admitting.set()

    async def clear_kv_cache(self) -> None:
        """Nothing to do: no keys and values outlive their request."""

    async def release_kv_cache(self) -> None:
        """Nothing to do, see `clear_kv_cache`."""

    async def resume_kv_cache(self) -> None:
        """Nothing to do, see `clear_kv_cache`."""

    async def start_profile(self, **kwargs: Any) -> None:
        """The engine has no profiler."""

    async def stop_profile(self) -> None:
        """The engine has no profiler."""


class HFReplica(RolloutReplica):
    """Starts the server and passes verl's calls on to it."""

    def __init__(self, replica_rank: int, config: RolloutConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(replica_rank, config, *args, **kwargs)
        check_rollout_config(self.config)
        if self.is_reward_model or self.is_teacher_model:
            raise NotImplementedError("the rollout `hf` serves the policy only: it has no endpoint for a reward model")

    async def launch_servers(self) -> None:
        node_id = await self.workers[0].__ray_call__.remote(lambda worker: ray.get_runtime_context().get_node_id())
        server = (
            ray.remote(HFServer)
            .options(
                name=server_name(self.replica_rank),
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node_id, soft=False),
                max_concurrency=self.max_concurrency,
                num_cpus=1,
            )
            .remote(self.config, self.model_config, self.rollout_mode, self.replica_rank)
        )
        # Waits for the model to be there; an error in it surfaces here.
        await server.wait_for_requests_to_drain.remote()
        self.servers = [server]
        self._server_handle = server
        # verl's load balancer tells servers apart by this.
        self._server_address = server_name(self.replica_rank)

    async def sleep(self) -> None:
        await self._server_handle.wait_for_requests_to_drain.remote()
        await super().sleep()

    async def abort_request(self, request_id: str) -> dict[str, Any]:
        return await self._server_handle.abort_request.remote(request_id)


class HFServerAdapter(BaseRollout):
    """A trainer rank's end of the line to its server."""

    def __init__(
        self,
        config: RolloutConfig,
        model_config: HFModelConfig,
        device_mesh: DeviceMesh,
        replica_rank: int = -1,
    ) -> None:
        super().__init__(config, model_config, device_mesh)
        check_rollout_config(self.config)
        self.replica_rank = replica_rank if replica_rank != -1 else int(os.environ["RANK"])
        self.is_leader_rank = True
        self._server: Any = None

    @property
    def server(self) -> Any:
        # The server is started after the trainer.
        if self._server is None:
            self._server = ray.get_actor(server_name(self.replica_rank))
        return self._server

    async def resume(self, tags: list[str]) -> None:
        if self.config.free_cache_engine:
            await self.server.wake_up.remote(tags=tags)

    async def release(self) -> None:
        if self.config.free_cache_engine:
            await self.server.sleep.remote()

    async def update_weights(
        self, weights, wire_format: str = "named_tensors", global_steps: int | None = None, **kwargs: Any
    ) -> None:
        """Sends full tensors in buckets of `checkpoint_engine.update_weights_bucket_megabytes`."""
        if wire_format != "named_tensors":
            raise NotImplementedError(f"the rollout `hf` takes full tensors, not {wire_format}")
        if kwargs.get("peft_config") is not None:
            raise NotImplementedError(
                "the rollout `hf` has no LoRA adapters: set actor_rollout_ref.model.lora.merge=True"
            )

        limit = self.config.checkpoint_engine.update_weights_bucket_megabytes << 20
        received: list[str] = []
        bucket: dict[str, torch.Tensor] = {}
        size = 0
        # Every rank walks through all of the weights: FSDP gathers each one when it is asked for.
        async for name, weight in ensure_async_iterator(weights):
            if bucket and size + weight.nbytes > limit:
                received += await self.server.update_weights.remote(bucket)
                bucket, size = {}, 0
            bucket[name] = weight.detach()
            size += weight.nbytes
        if bucket:
            received += await self.server.update_weights.remote(bucket)
        await self.server.finish_update.remote(received, global_steps)
