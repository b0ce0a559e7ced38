"""verl's replay buffer, polling for finished rollouts more often than the default of every two seconds."""

from collections.abc import Callable
from typing import Any

from omegaconf import open_dict
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

# Seconds between two polls. A toy rollout takes about a second.
POLL_INTERVAL = 0.05


def quick_replay_buffer(refill_fn: Callable[..., Any], **options: Any) -> ReplayBuffer:
    """verl's own buffer with a shorter poll interval, for `trainer.v1.sampler.custom_sampler`.

    verl passes the settings of `algorithm.filter_groups` and `sync_refill_failed_groups` to its own buffers only. So
    this has the trainer, the owner of `refill_fn`, build its own buffer as if there were no custom sampler.
    """
    trainer = refill_fn.__self__  # type: ignore[attr-defined]
    with open_dict(trainer.config.trainer.v1.sampler) as sampler:
        sampler.custom_sampler = None  # type: ignore[attr-defined]
    buffer = trainer._build_replay_buffer()
    buffer.poll_interval = POLL_INTERVAL
    return buffer
