"""The time limit of weight updates, in verl's own manager, with trainers that answer, fail or hang."""

import asyncio
import threading
from types import SimpleNamespace

import pytest
import verl  # noqa: F401  loads the plugin
from verl.checkpoint_engine import base
from verl.workers.config import CheckpointEngineConfig

from verl_sspo.hf import weight_sync


@pytest.fixture
def manager(monkeypatch):
    """A manager as in the recipes. Its trainers answer by calling `manager.answer`."""
    config = CheckpointEngineConfig(backend="naive", custom_backend_module="verl_sspo.hf.weight_sync")
    asked = []
    trainers = SimpleNamespace(update_weights=lambda **arguments: asked.append(arguments))
    manager = base.CheckpointEngineManager(config, trainers, replicas=[])
    manager.asked = asked
    manager.answer = lambda: None
    monkeypatch.setattr(base.ray, "get", lambda refs: manager.answer())
    return manager


def test_an_update_in_time_is_verls_own(manager):
    assert manager.update_weights(3) == {}
    assert manager.asked == [{"global_steps": 3, "mode": "naive"}]

    async def awaits():
        return await manager.update_weights(global_steps=4)

    assert asyncio.run(awaits()) == {}


def test_an_error_of_the_update_arrives(manager):
    def fail():
        raise ValueError("a shape")

    manager.answer = fail
    with pytest.raises(ValueError, match="a shape"):
        manager.update_weights(3)


def test_an_update_that_hangs_is_an_error(manager, monkeypatch):
    monkeypatch.setenv(weight_sync.LIMIT, "0.1")
    hangs = threading.Event()
    manager.answer = hangs.wait
    try:
        with pytest.raises(weight_sync.WeightUpdateTimeoutError, match=r"within 0\.1 s.*VERL_SSPO_WEIGHT_SYNC_SECONDS"):
            manager.update_weights(3)
    finally:
        hangs.set()
