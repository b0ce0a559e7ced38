"""Reports values that the loss or the estimator cannot use: one warning per input, or an error that stops the run.

Nothing is repaired. A NaN makes the loss NaN, and verl's FSDP engine skips an update whose gradient is not finite. An
infinite log-ratio saturates its gate.
"""

import logging
from collections.abc import Mapping

import torch

logger = logging.getLogger(__name__)

_reported: set[str] = set()


def unusable(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A bool mask: where `tensor` is NaN, infinite or, for `rollout_is_weights`, negative."""
    bad = ~tensor.isfinite()
    return bad | (tensor < 0) if name == "rollout_is_weights" else bad


def describe(name: str, tensor: torch.Tensor, mask: torch.Tensor) -> str:
    """Says how many and which values of `tensor` are unusable where `mask`, of the same shape, is true."""
    bad = mask & unusable(name, tensor)
    inf = float("inf")
    kinds = {"NaN": tensor.isnan(), "+inf": tensor == inf, "-inf": tensor == -inf, "negative": tensor.isfinite()}
    counts = {kind: int((bad & where).sum()) for kind, where in kinds.items()}
    parts = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    first = tuple(bad.nonzero()[0].tolist())
    return f"{name}: {int(bad.sum())} of {int(mask.sum())} valid values are unusable ({parts}), the first at {first}"


def report(tensors: Mapping[str, torch.Tensor], mask: torch.Tensor, call: int, consequence: str, *, stop: bool) -> None:
    """Warns about unusable values, once per input name in this process, or stops the run.

    Args:
        tensors: the inputs by name.
        mask: which values count, bool, of the tensors' shape.
        call: number of the call in this process, from 1.
        consequence: what happens next if the run continues.
        stop: raise instead of warning.

    Raises:
        FloatingPointError: if `stop` is set and there are unusable values.
    """
    bad = {name: tensor for name, tensor in tensors.items() if (mask & unusable(name, tensor)).any()}
    if not bad:
        return
    text = f"in call {call} of this process, {'; '.join(describe(*each, mask) for each in bad.items())}"
    if stop:
        raise FloatingPointError(f"SSPO: {text}. The run stops because stop_on_nonfinite is set.")
    if not set(bad) <= _reported:
        logger.warning("SSPO: %s. %s Further cases are counted but not reported.", text, consequence)
        _reported.update(bad)
