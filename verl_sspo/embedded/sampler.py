"""verl's replay buffers, looking for finished rollouts more often than every two seconds."""

from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

# Seconds between two looks. A toy rollout takes about a second.
POLL_INTERVAL = 0.05


class QuickReplayBuffer(ReplayBuffer):
    """For `trainer.v1.trainer_mode=sync`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, poll_interval=POLL_INTERVAL)


class QuickReplayBufferAsync(ReplayBufferAsync):
    """For the asynchronous trainer modes."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, poll_interval=POLL_INTERVAL)
