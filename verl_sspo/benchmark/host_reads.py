"""How often a call makes the host wait for the device."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# What brings a tensor's values to the host: operators (item, bool, float, ... are the first), and methods that
# reach no operator on a CPU.
_OPERATORS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
}
_METHODS = {torch.Tensor.tolist, torch.Tensor.cpu}


def host_reads(call: Callable[[], object], device: torch.device) -> int:
    """Counts the synchronisations of `call`.

    On CUDA those that `torch.cuda.set_sync_debug_mode` reports, copies from the host included. On a CPU, which never
    waits, the reads that would be one: `item`, `tolist`, `bool`, `float`, `cpu`, `nonzero`.
    """
    if device.type == "cuda":
        return _cuda_synchronisations(call)
    with _Operators() as operators, _Methods() as methods:
        call()
    return operators.count + methods.count


class _Operators(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in _OPERATORS
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in _METHODS
        return func(*args, **(kwargs or {}))


def _cuda_synchronisations(call: Callable[[], object]) -> int:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
