"""The plugin for vLLM on a CPU, with a fake vLLM. tests/e2e/test_vllm_on_cpu.py uses the real one."""

import sys
from importlib.metadata import entry_points
from types import ModuleType, SimpleNamespace

import pytest


def vllm(monkeypatch, is_cpu):
    """Installs a fake `vllm` whose packing records whether the weight would be removed."""
    removed = []
    utils = ModuleType("vllm.model_executor.layers.utils")
    utils.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: removed.append((layer, remove_weight))
    platforms = ModuleType("vllm.platforms")
    platforms.current_platform = SimpleNamespace(is_cpu=lambda: is_cpu)
    layers = ModuleType("vllm.model_executor.layers")
    layers.utils = utils
    for name in ("vllm", "vllm.model_executor"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for module in (platforms, layers, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return utils, removed


@pytest.mark.parametrize("is_cpu", [True, False])
def test_weights_are_kept_on_a_cpu_alone(monkeypatch, is_cpu):
    utils, removed = vllm(monkeypatch, is_cpu)
    (plugin,) = entry_points(group="vllm.general_plugins", name="sspo_cpu")
    plugin.load()()
    # As vLLM's linear layers call it.
    utils.dispatch_cpu_unquantized_gemm("layer", remove_weight=True)
    assert removed == [("layer", not is_cpu)]
