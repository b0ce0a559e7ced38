"""The rollout engine `hf`: verl's replica, server and trainer-side adapter around a transformers model.

Each trainer rank has one replica: a Ray actor with its own copy of the model, on the CPU or on that rank's GPU. It
takes tokens and returns tokens; there is no HTTP endpoint.
"""

import asyncio
import hashlib
import os
from array import array
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, PreTrainedModel
from verl.plugin.platform import get_platform
from verl.utils import normalize_token_ids
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.config import HFModelConfig, RolloutConfig
from verl.workers.engine.fsdp.utils import unfuse_moe_params
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput
from verl.workers.rollout.utils import ensure_async_iterator

from verl_sspo.hf.generation import BatchedGenerator, Completion, Request, SamplingParams
from verl_sspo.hf.threads import use_cores

# An idle server starts once no request has come for QUIET seconds, so that requests sent together share a batch.
QUIET = 0.02


def server_name(replica_rank: int) -> str:
    """Name of the Ray actor, by which a trainer rank finds its server."""
    return f"hf_server_{replica_rank}_0"


def check_rollout_config(config: RolloutConfig) -> None:
    """Raises ValueError for settings that the engine does not support."""
    size = config.tensor_model_parallel_size * config.data_parallel_size * config.pipeline_model_parallel_size
    if size != 1:
        raise ValueError(
            f"the rollout `hf` holds the whole model in one process, but its replica would span {size}: set tensor_, "
            "data_ and pipeline_model_parallel_size of actor_rollout_ref.rollout to 1"
        )


class HFServer:
    """Ray actor with the model: generates, and takes new weights.

    Requests live in the actor's event loop. Everything that touches the model (a step of generation, new weights,
    aborting) runs in one thread: in order, and never during a step.

    Args:
        config, model_config: verl's dataclasses, or the DictConfig they are made from.
        replicas_per_node: servers that share this node's cores, if they compute on the CPU.
    """

    def __init__(self, config: Any, model_config: Any, replica_rank: int, replicas_per_node: int = 1) -> None:
        self.config: RolloutConfig = omega_conf_to_dataclass(config)
        self.model_config: HFModelConfig = omega_conf_to_dataclass(model_config, dataclass_type=HFModelConfig)
        self.replica_rank = replica_rank
        self.platform = get_platform()
        self.device = torch.device(self.platform.device_name)
        if self.device.type == "cpu":
            use_cores(replicas_per_node, f"rollout replica {replica_rank}")
        # Version of the weights, set by the trainer with each update.
        self.global_steps: int | None = None

        hf_config = self.model_config.hf_config
        self.max_model_len = self.config.max_model_len or hf_config.get_text_config().max_position_embeddings
        self.model = self._load_model()
        self._move(self.device)
        # load_format=dummy gives random numbers, not weights to sample from.
        self.has_weights = self.config.load_format != "dummy"
        # The tokenizer's end-of-sequence token and the model's, which may have several.
        declared = getattr(self.model_config.generation_config, "eos_token_id", None)
        ids = [self.model_config.tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])]
        self.eos_token_ids = tuple(dict.fromkeys(i for i in ids if i is not None))
        self.generator = BatchedGenerator(
            self.model,
            pad_token_id=self.model_config.tokenizer.pad_token_id or 0,
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
        )
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generation")
        self._futures: dict[Request, asyncio.Future[Completion]] = {}
        self._running: asyncio.Task[None] | None = None
        # Names of the parameters received since the last `finish_update`.
        self._received: set[str] = set()
        # Number of requests per prompt since the last update of the weights, see `_seed`.
        self._asked: Counter[tuple[int, ...]] = Counter()
        # While paused, requests wait or are rejected. `_changed` is notified when these flags or `_futures` change.
        self._paused = self._rejecting = False
        self._changed = asyncio.Condition()

    def _load_model(self) -> PreTrainedModel:
        config, trust = self.model_config.hf_config, self.model_config.trust_remote_code
        dtype = PrecisionType.to_dtype(self.config.dtype)
        if self.config.load_format == "dummy":
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust)
        path = str(self.model_config.local_path)
        return AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype, trust_remote_code=trust)

    async def generate(
        self,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        request_id: str,
        image_data: list[Any] | None = None,
        video_data: list[Any] | None = None,
        audio_data: list[Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
        n: int | None = None,
    ) -> TokenOutput:
        """Tokens in, tokens out.

        Args:
            n: draw this many responses. They are TokenOutputs in `extra_fields["responses"]` of the result, and do not
                depend on which replica draws them.

        Raises:
            ValueError: the request is invalid; the message gives the reason.
            RuntimeError: no weights have arrived yet.
        """
        if image_data or video_data or audio_data:
            raise ValueError("the rollout `hf` generates from text only, but the request holds images, video or audio")
        if n is None:
            return await self._generate(prompt_ids, sampling_params, request_id, self.replica_rank)
        responses = await asyncio.gather(
            *(self._generate(prompt_ids, sampling_params, request_id, 0) for _ in range(n))
        )
        fields = {"responses": responses, "global_steps": self.global_steps}
        return TokenOutput(token_ids=[], log_probs=[], extra_fields=fields)

    async def _generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, replica: int
    ) -> TokenOutput:
        """One response, with random numbers of this replica: see `_seed`."""
        prompt_ids = normalize_token_ids(prompt_ids)
        async with self._changed:
            await self._changed.wait_for(lambda: self._rejecting or not self._paused)
        if self._rejecting:
            return self._to_output([], [], "aborted")
        if not self.has_weights:
            raise RuntimeError("the rollout `hf` has no weights yet: with load_format=dummy the trainer sends them")

        params = self._to_sampling_params(prompt_ids, dict(sampling_params), replica)
        request = Request(request_id, prompt_ids, params)
        self.generator.submit(request)
        self._futures[request] = asyncio.get_running_loop().create_future()
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        try:
            completion = await self._futures[request]
        finally:
            async with self._changed:
                del self._futures[request]
                self._changed.notify_all()
        return self._to_output(completion.token_ids, completion.log_probs, completion.stop_reason)

    async def _run(self) -> None:
        """Steps until nothing is left to do. An error of the generator goes to all requests."""
        seen = 0
        while seen != (seen := self.generator.unfinished):
            await asyncio.sleep(QUIET)
        while self.generator.unfinished:
            try:
                self._resolve(await self._in_thread(self.generator.step))
            except Exception as error:
                await self._in_thread(self.generator.abort)
                for future in self._futures.values():
                    if not future.done():
                        future.set_exception(error)

    def _in_thread(self, function: Any, *args: Any) -> asyncio.Future:
        return asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    def _resolve(self, completions: list[Completion]) -> None:
        for completion in completions:
            future = self._futures.get(completion.request)
            # A cancelled caller has removed its future.
            if future is not None and not future.done():
                future.set_result(completion)

    def _to_sampling_params(self, prompt_ids: list[int], params: dict[str, Any], replica: int) -> SamplingParams:
        """Converts verl's dictionary, with the names of vLLM or SGLang, to this engine's parameters."""
        room = self.max_model_len - len(prompt_ids)
        if room < 1:
            raise ValueError(
                f"a prompt of {len(prompt_ids)} tokens leaves no room in the context of {self.max_model_len} "
                "(rollout.max_model_len, or the model's max_position_embeddings)"
            )
        # Default as in verl's vLLM server: response_length, or less if the prompt is longer than prompt_length.
        length = self.config.response_length
        default = min(length, self.config.prompt_length + length - len(prompt_ids))
        limits = [params.pop("max_tokens", None), params.pop("max_new_tokens", None), default]
        max_tokens = next(limit for limit in limits if limit is not None)
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
            seed=self._seed(prompt_ids, params.pop("seed", self.config.seed), replica),
        )
        if params.pop("repetition_penalty", self.config.repetition_penalty) != 1.0:
            raise ValueError("the rollout `hf` has no repetition_penalty: leave it at 1.0")
        if params:
            raise ValueError(f"the rollout `hf` does not know these sampling parameters: {', '.join(sorted(params))}")
        return sampling_params

    def _seed(self, prompt_ids: list[int], seed: int, replica: int) -> int:
        """A seed for the k-th request with this prompt since the last update of the weights.

        The samples of one prompt are interchangeable, so a run is reproducible whatever the order in which concurrent
        requests arrive. verl sends each request to any replica. Single requests with one prompt may go to several
        replicas, whose samples must differ, so `replica` is the rank. A group of responses comes from one replica and
        must not depend on which, so `replica` is 0.
        """
        prompt = tuple(prompt_ids)
        key = (seed, replica, self.global_steps or 0, self._asked[prompt])
        self._asked[prompt] += 1
        digest = hashlib.blake2b(array("q", [*key, *prompt]).tobytes(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def _to_output(self, token_ids: list[int], log_probs: list[float], stop_reason: str) -> TokenOutput:
        fields = {"global_steps": self.global_steps}
        return TokenOutput(token_ids=token_ids, log_probs=log_probs, stop_reason=stop_reason, extra_fields=fields)

    async def update_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Copies these parameters, tensors on the CPU, into the model.

        Raises:
            ValueError: a name or a shape does not match the model.
        """
        own = self._by_name(self.model.state_dict())
        if unexpected := weights.keys() - own.keys():
            raise ValueError(f"the trainer sends {', '.join(sorted(unexpected))}, which the rollout's model lacks")
        for name, weight in weights.items():
            if weight.shape != own[name].shape:
                shapes = f"{tuple(weight.shape)}, the rollout's model has {tuple(own[name].shape)}"
                raise ValueError(f"the trainer sends {name} of shape {shapes}")
        await self._in_thread(self._copy, own, weights)
        self._received |= weights.keys()

    def _by_name(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors by the names that verl's trainer sends; stacked experts become a view of each."""
        return dict(unfuse_moe_params(tensors.items(), self.model.config.model_type))

    @staticmethod
    @torch.no_grad()
    def _copy(targets: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            targets[name].copy_(weight)

    async def finish_update(self, global_steps: int | None) -> None:
        """Makes the weights valid after the last `update_weights`.

        Raises:
            ValueError: a parameter is missing.
        """
        # Of tied parameters, one name is enough: `named_parameters` lists only the first.
        if missing := self._by_name(dict(self.model.named_parameters())).keys() - self._received:
            raise ValueError(f"the trainer's weights lack {', '.join(sorted(missing))}")
        self.has_weights, self.global_steps = True, global_steps
        self._received.clear()
        self._asked.clear()

    async def wait_for_requests_to_drain(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: not self._futures)

    async def abort_all_requests(self, reject_request: bool = False) -> dict[str, Any]:
        """Ends all requests with what they have; later ones wait for `resume_generation`, or are rejected."""
        await self._pause(True, reject_request)
        aborted = await self._in_thread(self.generator.abort)
        self._resolve(aborted)
        return {"aborted_count": len(aborted), "request_ids": [each.request.request_id for each in aborted]}

    async def resume_generation(self) -> None:
        await self._pause(False, False)

    async def _pause(self, paused: bool, rejecting: bool) -> None:
        async with self._changed:
            self._paused, self._rejecting = paused, rejecting
            self._changed.notify_all()

    async def sleep(self) -> None:
        """With `free_cache_engine`, moves the model to the CPU, which frees the device's memory for the trainer."""
        if self.config.free_cache_engine:
            await self._in_thread(self._move, torch.device("cpu"))

    async def wake_up(self) -> None:
        await self._in_thread(self._move, self.device)

    def _move(self, device: torch.device) -> None:
        self.model.to(device)  # type: ignore[arg-type]  # transformers wraps it
        self.platform.empty_cache()

    async def _nothing(self, **kwargs: Any) -> None:
        """Does nothing: keys and values are freed with their request, and the engine has no profiler."""

    clear_kv_cache = release_kv_cache = resume_kv_cache = start_profile = stop_profile = _nothing


class HFReplica(RolloutReplica):
    """Starts the server and passes verl's calls on to it."""

    def __init__(self, replica_rank: int, config: RolloutConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(replica_rank, config, *args, **kwargs)
        check_rollout_config(self.config)
        if self.is_reward_model or self.is_teacher_model:
            raise NotImplementedError("the rollout `hf` serves the policy only: it has no endpoint for a reward model")

    async def launch_servers(self) -> None:
        # The server requests no GPU from Ray: it shares that of its trainer rank.
        platform = get_platform()
        resource = platform.ray_resource_name()
        node_id, device = await self.workers[0].__ray_call__.remote(
            lambda worker: (
                ray.get_runtime_context().get_node_id(),
                ray.get_runtime_context().get_accelerator_ids()[resource][0],
            )
        )
        env_vars = dict.fromkeys(platform.ray_noset_envvars(), "1") | {platform.visible_devices_envvar(): device}
        server = (
            ray.remote(HFServer)
            .options(
                name=server_name(self.replica_rank),
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node_id, soft=False),
                runtime_env={"env_vars": env_vars},
                max_concurrency=self.max_concurrency,
                num_cpus=1,
            )
            .remote(self.config, self.model_config, self.replica_rank, self.gpus_per_node)
        )
        # Waits until the model is loaded; an error while loading is raised here.
        await server.wait_for_requests_to_drain.remote()
        self.servers = [server]
        self._server_handle = server
        # verl's load balancer tells servers apart by this.
        self._server_address = server_name(self.replica_rank)


class HFServerAdapter(BaseRollout):
    """A trainer rank's connection to its server."""

    def __init__(
        self, config: RolloutConfig, model_config: HFModelConfig, device_mesh: DeviceMesh, replica_rank: int = -1
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
        if "weights" in tags:
            await self.server.wake_up.remote()

    async def release(self) -> None:
        await self.server.sleep.remote()

    async def update_weights(
        self, weights, wire_format: str = "named_tensors", global_steps: int | None = None, **kwargs: Any
    ) -> None:
        """Sends full tensors, in the rollout's dtype and on the CPU, in buckets.

        `checkpoint_engine.update_weights_bucket_megabytes` is the size of a bucket.
        """
        if wire_format != "named_tensors":
            raise NotImplementedError(f"the rollout `hf` takes full tensors, not {wire_format}")
        if kwargs.get("peft_config") is not None:
            raise NotImplementedError(
                "the rollout `hf` has no LoRA adapters: set actor_rollout_ref.model.lora.merge=True"
            )

        limit = self.config.checkpoint_engine.update_weights_bucket_megabytes << 20
        dtype = PrecisionType.to_dtype(self.config.dtype)
        bucket: dict[str, torch.Tensor] = {}
        size = 0
        # Every rank iterates over all weights: FSDP gathers each one on access.
        async for name, weight in ensure_async_iterator(weights):
            weight = weight.detach().to("cpu", dtype)
            if bucket and size + weight.nbytes > limit:
                await self.server.update_weights.remote(bucket)
                bucket, size = {}, 0
            bucket[name] = weight
            size += weight.nbytes
        if bucket:
            await self.server.update_weights.remote(bucket)
        await self.server.finish_update.remote(global_steps)
