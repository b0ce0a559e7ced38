"""verl's replay buffers, looking for finished rollouts more often than every two seconds."""

from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

# Seconds between two looks. A toy rollout takes about a second.
POLL_INTERVAL = 0.05


def quick_replay_buffer(trainer_mode: str, **options: Any) -> ReplayBuffer:
    """The buffer that verl would take for this `trainer.v1.trainer_mode`; for `trainer.v1.sampler.custom_sampler`."""
    buffer = ReplayBuffer if trainer_mode == "sync" else ReplayBufferAsync
    return buffer(trainer_mode=trainer_mode, poll_interval=POLL_INTERVAL, **options)
