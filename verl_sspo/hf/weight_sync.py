"""A time limit for updates of the rollout's weights: an update that hangs ends the run with an error.

verl's driver waits for an update without a limit, and it can hang forever: if vLLM fails to load the weights, the
trainer still waits for its acknowledgement. verl imports this module if
`rollout.checkpoint_engine.custom_backend_module` names it, as in recipes/hardware/cpu.yaml.
"""

import functools
import os
import threading
from concurrent.futures import Future, wait
from typing import Any

from verl.checkpoint_engine import CheckpointEngineManager
from verl.utils.ray_utils import auto_await

# Environment variable with the limit in seconds.
LIMIT = "VERL_SSPO_WEIGHT_SYNC_SECONDS"
DEFAULT_LIMIT = 300.0


class WeightUpdateTimeoutError(RuntimeError):
    """An update of the rollout's weights took longer than the limit."""

    def __init__(self, limit: float) -> None:
        super().__init__(
            f"the rollout did not take the trainer's weights within {limit:g} s. If it failed, its own error is above, "
            f"in the log of the run. If it is only slow, raise the limit: set {LIMIT} (seconds)"
        )


_update_weights = CheckpointEngineManager.update_weights


@functools.wraps(_update_weights)
@auto_await
async def update_weights(self: CheckpointEngineManager, *args: Any, **kwargs: Any) -> Any:
    """Runs verl's own `update_weights` in a thread, which is abandoned if it takes too long.

    Raises:
        WeightUpdateTimeoutError: it took longer than the limit.
    """
    limit = float(os.environ.get(LIMIT, DEFAULT_LIMIT))
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(_update_weights(self, *args, **kwargs))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="update_weights", daemon=True).start()
    # Blocks, as verl's does: nothing may be generated or trained meanwhile.
    if not wait([outcome], timeout=limit).done:
        raise WeightUpdateTimeoutError(limit)
    return outcome.result()


CheckpointEngineManager.update_weights = update_weights  # type: ignore[method-assign]
