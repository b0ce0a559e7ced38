"""The checkpoint engine `gloo`: every rollout gets what the first trainer rank sends."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import fresh_process
import pytest
import torch

SENT = {
    "matrix": torch.arange(6.0).view(2, 3).t(),  # not contiguous
    "half": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
    "scalar": torch.tensor(7),
    "nothing": torch.empty(0, 4),
}


@pytest.mark.parametrize(("trainers", "rollouts"), [(1, 1), (2, 3)])
def test_every_rollout_gets_the_first_ranks_weights(trainers, rollouts):
    from verl_sspo.cpu.weights import GlooCheckpointEngine

    engines = [GlooCheckpointEngine(bucket_size=1, is_master=rank == 0) for rank in range(trainers + rollouts)]
    walked = []

    async def send(engine):
        def gather():
            for name, weight in SENT.items():
                walked.append(name)
                yield name, weight

        await engine.send_weights(gather(), global_steps=1)

    async def receive(engine):
        return {name: weight async for name, weight in engine.receive_weights(global_steps=1)}

    # Twice: one transfer must not disturb the next.
    for _ in range(2):
        walked.clear()
        topology = GlooCheckpointEngine.build_topology(trainers, rollouts, [engine.prepare() for engine in engines])
        arguments = [
            {name: values[i] for name, values in side.items()}
            for side, count in zip(topology, (trainers, rollouts), strict=True)
            for i in range(count)
        ]
        with ThreadPoolExecutor(len(engines)) as pool:
            list(pool.map(lambda engine, kwargs: engine.init_process_group(**kwargs), engines, arguments))
            sent = [pool.submit(asyncio.run, send(engine)) for engine in engines[:trainers]]
            got = [pool.submit(asyncio.run, receive(engine)) for engine in engines[trainers:]]
            for future in sent:
                future.result(timeout=60)
            for future in got:
                weights = future.result(timeout=60)
                assert list(weights) == list(SENT)
                for name, weight in weights.items():
                    assert weight.dtype == SENT[name].dtype
                    assert torch.equal(weight, SENT[name])
        # Every rank must read every weight: FSDP gathers a weight only when all ranks ask for it.
        assert sorted(walked) == sorted([*SENT] * trainers)
        for engine in engines:
            engine.finalize()


KEEPS_A_COPY = """
from types import SimpleNamespace
import torch
from torch.distributed.fsdp import fully_shard
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
import verl
import verl_sspo.cpu.weights
from verl.experimental.separation.engine_workers import DetachActorWorker

model = fully_shard(torch.nn.Linear(2, 1), mesh=torch.distributed.init_device_mesh("cpu", (1,)))
worker = SimpleNamespace(_strategy_handlers=None, config=SimpleNamespace(actor=SimpleNamespace(strategy="fsdp2")))
save, restore = DetachActorWorker._get_strategy_handlers(worker)
before = model.weight.full_tensor().clone()
saved = save(model)
with torch.no_grad():
    model.weight.add_(1.0)
assert not torch.equal(model.weight.full_tensor(), before)
restore(model, *saved)
assert torch.equal(model.weight.full_tensor(), before)
"""


def test_the_old_policy_that_verl_keeps_is_a_copy(tmp_path):
    """Without a copy, separate_async would restore the current policy, and every ratio would be 1."""
    fresh_process.run(KEEPS_A_COPY, tmp_path, VERL_PLATFORM="cpu")


def test_another_verl_is_refused(monkeypatch):
    from verl.utils import fsdp_utils

    from verl_sspo.cpu import internals
    from verl_sspo.hf.register import IncompatibleVerlError

    monkeypatch.setattr(fsdp_utils, "fsdp2_sharded_save_to_cpu", lambda model, device: None)
    with pytest.raises(IncompatibleVerlError, match="fsdp2_sharded_save_to_cpu"):
        internals.save_copies_of_weights()
