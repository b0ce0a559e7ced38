"""When verl chooses the CPU platform, and what it finds there."""

import os
import subprocess
import sys
from types import SimpleNamespace

import fresh_process
import psutil
import pytest

IS_UNTOUCHED = """
import os, sys
from verl.plugin.platform import get_platform
from verl.utils import distributed
assert get_platform().device_name != "cpu"
assert not hasattr(distributed.initialize_global_process_group_ray, "__wrapped__")
assert "VERL_ENGINE_DEVICE" not in os.environ
assert not {"verl_sspo.cpu.internals", "verl_sspo.hf.register"} & sys.modules.keys()
"""


@pytest.mark.parametrize(
    "pretend",
    [
        "import torch; torch.cuda.is_available = lambda: True",
        # A Ray actor without a GPU on a host with GPUs: verl finds them through nvidia-smi.
        "from verl.plugin.platform.platform_cuda import PlatformCUDA as P; P.check_smi_command = lambda *_: True; "
        "import shutil; shutil.which = lambda name: name",
        # A plugin that verl loads after ours.
        "from verl.plugin.platform import PlatformRegistry as R, PlatformBase\n"
        "class Late(R.get('nvidia')):\n"
        "    device_name = 'late'\n"
        "    def is_available(self): return True\n"
        "    is_platform_available = lambda self, use_smi_check=False: True\n"
        "R.register('late')(Late)",
    ],
    ids=["cuda", "gpu-less-actor", "later-plugin"],
)
def test_nothing_is_touched_where_another_platform_is_available(pretend, tmp_path):
    fresh_process.run(f"import verl\n{pretend}\n{IS_UNTOUCHED}", tmp_path)


def test_another_platform_knows_the_rollout_hf_where_it_is_asked_for():
    code = """
import verl
from verl.plugin.platform import platform_manager
assert platform_manager._current_platform is None, "choosing is left to verl"
from verl.workers.rollout.base import get_rollout_class
from verl.workers.rollout.replica import get_rollout_replica_class
assert get_rollout_class("hf").__name__ == "HFServerAdapter"
assert get_rollout_replica_class("hf").__name__ == "HFReplica"
import verl_sspo.hf.engine
from verl.workers.engine import EngineRegistry
assert EngineRegistry.get_engine_cls("language_model", "fsdp2").__name__ == "SharedPromptEngine"
from verl.plugin.platform import get_platform
assert get_platform().device_name == "cuda"
"""
    on_gpu = {"VERL_PLATFORM": "nvidia", "VERL_USE_EXTERNAL_MODULES": "verl_sspo.hf.register"}
    # verl reads the second variable when it is imported.
    result = subprocess.run([sys.executable, "-c", code], env=os.environ | on_gpu, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_verl_platform_keeps_the_backend_out(tmp_path):
    fresh_process.run(f"import verl\n{IS_UNTOUCHED}", tmp_path, VERL_PLATFORM="nvidia")


FINDS_EVERYTHING = """
import verl
from verl.plugin.platform import platform_manager
assert platform_manager._current_platform is None, "the plugin chose the platform"
import sys
assert "verl.workers.engine" not in sys.modules
# As in a trainer's worker: the choice falls while this module is imported.
from verl.workers import engine_workers

from verl.utils.device import get_device_name, get_torch_device
assert get_device_name() == "cpu"
assert 0 < get_torch_device().memory_allocated() <= get_torch_device().max_memory_allocated()
from verl.workers.engine import EngineRegistry
assert EngineRegistry.get_engine_cls("language_model", "fsdp2").__name__ == "FSDPEngineWithLMHead"
from verl.workers.rollout.base import get_rollout_class
from verl.workers.rollout.replica import get_rollout_replica_class
assert get_rollout_class("hf").__name__ == "HFServerAdapter"
assert get_rollout_replica_class("hf").__name__ == "HFReplica"

import os, tempfile, torch
os.environ.update(RANK="0", WORLD_SIZE="1", DIST_INIT_METHOD="file://" + tempfile.mktemp())
engine_workers.initialize_global_process_group_ray(timeout_second=None)
ones = torch.ones(2)
torch.distributed.all_reduce(ones)
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("environment", [{}, {"VERL_PLATFORM": "cpu"}], ids=["detected", "VERL_PLATFORM=cpu"])
def test_verl_finds_platform_engine_rollout_and_process_group(environment, tmp_path):
    fresh_process.run(FINDS_EVERYTHING, tmp_path, **environment)


def test_another_verl_is_refused_by_its_version(monkeypatch):
    import verl
    from verl.utils import distributed
    from verl.workers.rollout import base

    from verl_sspo.cpu import internals
    from verl_sspo.hf import register

    def is_refused(function):
        with pytest.raises(register.IncompatibleVerlError, match=verl.__version__.replace(".", r"\.")):
            function()

    with monkeypatch.context() as patch:
        patch.setattr(base, "_ROLLOUT_REGISTRY", {})
        is_refused(register.register_rollout)
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "initialize_global_process_group_ray", lambda: None)
        is_refused(internals.initialize_process_groups_with_gloo)


@pytest.mark.parametrize(
    ("cores", "ranks", "environment", "expected"),
    [
        (8, 1, {}, 8),
        (8, 2, {}, 4),
        (8, 2, {"VERL_SSPO_BUSY_PER_RANK": "2"}, 2),
        (8, 2, {"VERL_SSPO_THREADS": "1"}, 1),
        (8, 2, {"VERL_SSPO_THREADS": "64"}, 4),
        (2, 4, {}, 1),
    ],
)
def test_cores_are_divided_and_never_overcommitted(monkeypatch, capsys, cores, ranks, environment, expected):
    from verl_sspo.hf import threads

    given = []
    torch = SimpleNamespace(set_num_threads=given.append, get_num_threads=lambda: given[-1])
    monkeypatch.setattr(threads, "available_cores", lambda: cores)
    monkeypatch.setattr(threads, "torch", torch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    threads.use_cores(ranks, "trainer rank 0")
    assert given == [expected]
    assert f"trainer rank 0 computes with {expected} threads" in capsys.readouterr().out


def test_cores_are_physical_and_within_affinity_and_quota(monkeypatch, tmp_path):
    from verl_sspo.hf import threads

    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(threads, "Path", {"/sys/fs/cgroup/cpu.max": quota}.__getitem__)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert threads.available_cores() == 4
    for text, cores in (("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1)):
        quota.write_text(text)
        assert threads.available_cores() == cores
    quota.unlink()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert threads.available_cores() == 1
