"""The checkpoint engine `gloo`: sends weights over gloo from the trainer to rollouts in other processes.

For `trainer.v1.trainer_mode=separate_async`: verl's own engines for it (NCCL and others) all need an accelerator. verl
imports this module if `rollout.checkpoint_engine.custom_backend_module` names it, as in
recipes/mode/separate_async.yaml.
"""

from collections.abc import AsyncGenerator, Generator, Iterable
from datetime import timedelta
from typing import Any

import ray
import torch
from safetensors.torch import load, save
from torch.distributed import ProcessGroupGloo, TCPStore
from verl.checkpoint_engine import CheckpointEngine, CheckpointEngineRegistry
from verl.workers.rollout.utils import ensure_async_iterator

from verl_sspo.cpu import internals

# A transfer fails if a part of it takes longer than this.
TIMEOUT = timedelta(minutes=5)


@CheckpointEngineRegistry.register("gloo")
class GlooCheckpointEngine(CheckpointEngine):
    """The first trainer rank broadcasts full tensors one by one, in the format of safetensors.

    Args:
        bucket_size: passed by verl and ignored: there are no buckets.
        is_master: whether this is the first trainer rank.
    """

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self.is_master = is_master
        self._store: Any = None
        self._group: Any = None

    def prepare(self) -> dict[str, Any]:
        """On the first trainer rank, the address where it waits for the others; on other ranks, nothing."""
        if not self.is_master:
            return {}
        host = ray.util.get_node_ip_address().strip("[]")
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        return {"host_name": host, "port": self._store.port}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """The first trainer rank and all rollouts form the group; the other trainer ranks get rank -1."""

        def arguments(ranks: Iterable[int]) -> dict[str, list[Any]]:
            ranks = list(ranks)
            return {
                "rank": ranks,
                "world_size": [1 + rollout_world_size] * len(ranks),
                "address": [metadata[0]] * len(ranks),
            }

        trainers = [0] + [-1] * (actor_wg_world_size - 1)
        return arguments(trainers), arguments(range(1, 1 + rollout_world_size))

    def init_process_group(self, rank: int, world_size: int, address: dict[str, Any]) -> None:  # type: ignore[override]
        if rank < 0:
            return
        if rank > 0:
            self._store = TCPStore(**address, is_master=False, timeout=TIMEOUT)
        self._group = ProcessGroupGloo(self._store, rank, world_size, TIMEOUT)

    def finalize(self) -> None:
        self._group = self._store = None

    async def send_weights(
        self, weights: Generator[tuple[str, torch.Tensor], None, None], global_steps: int | None = None
    ) -> None:
        # Every rank iterates over all weights: FSDP gathers each one on access.
        async for name, weight in ensure_async_iterator(weights):
            if self.is_master:
                self._broadcast(save({name: weight.detach().contiguous()}))
        if self.is_master:
            self._broadcast(b"")

    async def receive_weights(  # type: ignore[override]  # verl's declaration lacks the `yield`
        self, global_steps: int | None = None
    ) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
        while message := self._broadcast():
            for name, weight in load(message).items():
                yield name, weight

    def _broadcast(self, message: bytes = b"") -> bytes:
        """Returns what the first rank sends, in every process of the group. An empty message ends the transfer."""
        length = torch.tensor([len(message)])
        self._group.broadcast(length, 0).wait()
        if not length:
            return b""
        content = torch.frombuffer(bytearray(message or int(length)), dtype=torch.uint8)
        self._group.broadcast(content, 0).wait()
        return content.numpy().tobytes()


internals.save_copies_of_weights()
