"""Says what is not finite among the inputs of loss and estimator: once, in words, or as the error that ends the run.

Nothing is repaired here. A NaN makes the loss NaN and verl's FSDP engine skips an update whose gradient is not finite;
an infinite log-ratio saturates its gate.
"""

import logging
from collections.abc import Mapping

import torch

logger = logging.getLogger(__name__)

_reported: set[str] = set()


def describe(name: str, tensor: torch.Tensor, mask: torch.Tensor) -> str:
    """In words, how many and which values of `tensor` are not finite where `mask` is true; both of one shape."""
    bad = mask & ~tensor.isfinite()
    kinds = {"NaN": tensor.isnan(), "+inf": tensor == float("inf"), "-inf": tensor == -float("inf")}
    counts = {kind: int((bad & where).sum()) for kind, where in kinds.items()}
    parts = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    first = tuple(bad.nonzero()[0].tolist())
    return f"{name}: {int(bad.sum())} of {int(mask.sum())} valid values are not finite ({parts}), the first at {first}"


def report(tensors: Mapping[str, torch.Tensor], mask: torch.Tensor, call: int, consequence: str, *, stop: bool) -> None:
    """Warns of values that are not finite, the first time for each name in this process, or stops the run.

    Args:
        tensors: by name, those that hold such values.
        mask: the values that count, of the tensors' shape.
        call: which call in this process it was, from 1.
        consequence: what follows if the run goes on.
        stop: raise instead.

    Raises:
        FloatingPointError: with `stop`.
    """
    text = f"in call {call} of this process, {'; '.join(describe(*each, mask) for each in tensors.items())}"
    if stop:
        raise FloatingPointError(f"SSPO: {text}. The run is stopped, as stop_on_nonfinite asks.")
    if not set(tensors) <= _reported:
        logger.warning("SSPO: %s. %s Further ones are only counted.", text, consequence)
        _reported.update(tensors)
