"""The embedded backend inside verl: when it registers itself, and the rollout's server without Ray."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from verl_sspo.quickstart.model import create_model, create_tokenizer

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("VERL_")}
ON_CPU = {**ENVIRONMENT, "VERL_PLATFORM": "cpu"}


def run_python(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


IS_UNTOUCHED = """
import os, sys, verl
from verl.plugin.platform import PlatformRegistry
from verl.utils import distributed
assert "cpu" not in PlatformRegistry.registered_names()
assert not hasattr(distributed.initialize_global_process_group_ray, "__wrapped__")
assert "VERL_ENGINE_DEVICE" not in os.environ
assert not any(name.startswith("verl_sspo.cpu.") for name in sys.modules)
"""


@pytest.mark.parametrize(
    "pretend",
    [
        "import torch; torch.cuda.is_available = lambda: True",
        # A Ray actor without GPU on a host that has some: verl finds them through nvidia-smi.
        "from verl.plugin.platform.platform_cuda import PlatformCUDA as P; P.check_smi_command = lambda *_: True; "
        "import shutil; shutil.which = lambda name: name",
    ],
    ids=["cuda", "gpu-less-actor"],
)
def test_nothing_is_touched_where_there_is_a_gpu(pretend):
    # `verl.plugin` cannot be imported without `verl`, whose plugins are therefore loaded afterwards.
    code = f"""
import os
os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"
{pretend}
import verl, verl_sspo.cpu
assert verl_sspo.cpu.register() is False
{IS_UNTOUCHED}
"""
    result = run_python(code, ENVIRONMENT)
    assert result.returncode == 0, result.stderr


def test_verl_platform_keeps_the_backend_out():
    result = run_python(IS_UNTOUCHED, {**ENVIRONMENT, "VERL_PLATFORM": "nvidia"})
    assert result.returncode == 0, result.stderr


def test_the_plugin_makes_verl_find_platform_engine_and_rollout():
    code = """
import verl
from verl.plugin.platform import platform_manager
assert platform_manager._current_platform is None, "the plugin chose the platform"
import sys
assert "verl.workers.engine" not in sys.modules
assert "verl_sspo.cpu.rollout" not in sys.modules

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
from verl.workers import engine_workers
engine_workers.initialize_global_process_group_ray(timeout_second=None)
ones = torch.ones(2)
torch.distributed.all_reduce(ones)
torch.distributed.destroy_process_group()
"""
    result = run_python(code, ON_CPU)
    assert result.returncode == 0, result.stderr


def test_another_verl_is_refused_by_its_version(monkeypatch):
    import verl
    from verl.plugin.platform import platform_manager
    from verl.utils import distributed
    from verl.workers.rollout import base

    from verl_sspo.cpu import internals

    def is_refused(function):
        with pytest.raises(internals.IncompatibleVerlError, match=verl.__version__.replace(".", r"\.")):
            function()

    with monkeypatch.context() as patch:
        patch.setattr(base, "_ROLLOUT_REGISTRY", {})
        is_refused(internals.register_rollout)
    with monkeypatch.context() as patch:
        patch.setattr(platform_manager, "_current_platform", SimpleNamespace(device_name="cuda"))
        is_refused(internals.register_platform)
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "initialize_global_process_group_ray", lambda: None)
        is_refused(internals.initialize_process_groups_with_gloo)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "verl.workers.engine_workers", sys)
        is_refused(internals.initialize_process_groups_with_gloo)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = create_tokenizer()
    create_model(tokenizer, seed=0).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def make_server(model_path):
    from verl.workers.config import HFModelConfig, RolloutConfig
    from verl.workers.rollout.replica import RolloutMode

    from verl_sspo.cpu.rollout import HFServer

    servers = []

    def make(**options) -> HFServer:
        config = RolloutConfig(
            **{
                "name": "hf",
                "tensor_model_parallel_size": 1,
                "dtype": "float32",
                "prompt_length": 8,
                "response_length": 6,
                "load_format": "auto",
                **options,
            }
        )
        model_config = HFModelConfig(path=model_path, override_config={"attn_implementation": "sdpa"})
        servers.append(HFServer(config, model_config, RolloutMode.HYBRID, replica_rank=0))
        return servers[-1]

    yield make
    for server in servers:
        server.generation.close()


def ask(server, request_id="a", prompt=(49, 43, 50), **sampling_params):
    return server.generate(list(prompt), sampling_params, request_id)


def test_the_server_answers_as_verl_expects(make_server):
    server = make_server()
    output = asyncio.run(ask(server, temperature=0.8, top_k=-1, top_p=1, repetition_penalty=1.0, logprobs=True))
    assert output.stop_reason == "completed"
    assert 1 <= len(output.token_ids) <= 6
    with torch.no_grad():
        logits = server.model(torch.tensor([[49, 43, 50, *output.token_ids]])).logits[0, 2:-1]
    expected = (logits / 0.8).log_softmax(-1).gather(1, torch.tensor(output.token_ids).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(torch.tensor(output.log_probs), expected, atol=1e-5, rtol=0)


def test_lengths_follow_verls_names_and_defaults(make_server):
    server = make_server(ignore_eos=True, max_model_len=12)

    async def lengths():
        outputs = [
            await ask(server),  # response_length
            await ask(server, prompt=[49] * 9),  # prompt_length + response_length - prompt, within max_model_len
            await ask(server, max_tokens=4),
            await ask(server, max_new_tokens=2),
            await ask(server, max_tokens=100),  # max_model_len - prompt
        ]
        return [len(output.token_ids) for output in outputs]

    assert asyncio.run(lengths()) == [6, 3, 4, 2, 9]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompt": [49] * 5000}, "leaves no room in the context of 4096"),
        ({"prompt": [100_000]}, "vocabulary"),
        ({"repetition_penalty": 1.1}, "no repetition_penalty"),
        ({"stop": ["\n"], "min_p": 0.1}, "does not know these sampling parameters: min_p, stop"),
        ({"top_p": 2.0}, "top_p must be"),
    ],
)
def test_what_cannot_be_done_is_the_requests_own_error(make_server, request_, message):
    server = make_server()

    async def ask_both():
        return await asyncio.gather(ask(server, **request_), ask(server, "good"), return_exceptions=True)

    bad, good = asyncio.run(ask_both())
    assert isinstance(bad, ValueError)
    assert message in str(bad)
    assert good.stop_reason == "completed"
    asyncio.run(asyncio.wait_for(server.wait_for_requests_to_drain(), timeout=10))


def test_samples_of_one_prompt_differ_and_can_be_repeated(make_server):
    def samples(server):
        async def ask_all():
            outputs = await asyncio.gather(*[ask(server, str(i), temperature=2.0) for i in range(6)])
            return [tuple(output.token_ids) for output in outputs]

        return asyncio.run(ask_all())

    first, again, other = samples(make_server()), samples(make_server()), samples(make_server(seed=1))
    assert len(set(first)) == 6
    assert first == again
    assert not set(first) & set(other)


def test_weights_of_the_trainer_take_effect(make_server, model_path):
    trained = create_model(create_tokenizer(), seed=1).state_dict()
    server = make_server(load_format="dummy")

    async def update_and_ask():
        with pytest.raises(RuntimeError, match="no weights yet"):
            await ask(server)
        half = len(trained) // 2
        received = await server.update_weights(dict(list(trained.items())[:half]))
        with pytest.raises(ValueError, match="lack model"):
            await server.finish_update(received, global_steps=0)
        received += await server.update_weights(dict(list(trained.items())[half:]))
        await server.finish_update(received, global_steps=3)
        return await ask(server, temperature=0)

    output = asyncio.run(update_and_ask())
    assert output.extra_fields["global_steps"] == 3
    for name, parameter in server.model.state_dict().items():
        assert torch.equal(parameter, trained[name])


def test_foreign_weights_are_refused(make_server):
    server = make_server()

    async def update():
        with pytest.raises(ValueError, match="nothing of that name"):
            await server.update_weights({"model.no_such.weight": torch.zeros(1)})
        with pytest.raises(ValueError, match=r"shape \(1,\), the rollout's model has with shape \(64,\)"):
            await server.update_weights({"model.norm.weight": torch.zeros(1)})

    asyncio.run(update())


def test_abort_returns_what_there_is_and_later_requests_wait(make_server):
    server = make_server(ignore_eos=True, max_model_len=4000, response_length=3900)

    async def abort_and_resume():
        running = asyncio.create_task(ask(server))
        while server.generation._generator.unfinished == 0:
            await asyncio.sleep(0.01)
        aborted = await server.abort_all_requests()
        assert aborted == {"aborted_count": 1, "request_ids": ["a"]}
        late = asyncio.create_task(ask(server, "late", max_tokens=2))
        await asyncio.sleep(0.1)
        assert not late.done()
        await server.resume_generation()
        return await running, await late

    running, late = asyncio.run(abort_and_resume())
    assert running.stop_reason == "aborted"
    assert len(running.token_ids) == len(running.log_probs) < 3900
    assert (late.stop_reason, len(late.token_ids)) == ("completed", 2)


def test_a_server_that_leaves_rejects_those_who_wait_and_those_who_come(make_server):
    server = make_server()

    async def leave():
        await server.abort_all_requests()
        waiting = asyncio.create_task(ask(server, "waiting"))
        await asyncio.sleep(0.05)
        await server.abort_all_requests(reject_request=True)
        return await waiting, await ask(server, "late")

    outputs = asyncio.run(asyncio.wait_for(leave(), timeout=30))
    assert [(o.stop_reason, o.token_ids) for o in outputs] == [("aborted", [])] * 2


def test_requests_wait_while_the_engine_sleeps(make_server):
    server = make_server(free_cache_engine=True)

    async def sleep_and_wake():
        await server.sleep()
        request = asyncio.create_task(ask(server))
        await server.wake_up(tags=["weights"])
        await asyncio.sleep(0.1)
        assert not request.done()
        await server.wake_up(tags=["kv_cache"])
        return await request

    assert asyncio.run(sleep_and_wake()).stop_reason == "completed"


def test_one_of_several_requests_can_be_aborted(make_server):
    server = make_server(ignore_eos=True, max_model_len=4000, response_length=3900)

    async def abort_one():
        long = asyncio.create_task(ask(server, "long"))
        short = asyncio.create_task(ask(server, "short", max_tokens=3))
        await asyncio.sleep(0.1)
        assert (await server.abort_request("nobody"))["aborted"] is False
        assert (await server.abort_request("long"))["aborted"] is True
        return await long, await short

    long, short = asyncio.run(abort_one())
    assert (long.stop_reason, short.stop_reason) == ("aborted", "completed")


def test_a_replica_of_several_ranks_is_refused():
    from verl.workers.config import RolloutConfig

    from verl_sspo.cpu.rollout import check_rollout_config

    with pytest.raises(ValueError, match="its replica would span 2"):
        check_rollout_config(RolloutConfig(name="hf"))  # verl's default is tensor_model_parallel_size=2


def test_the_recipe_is_valid():
    import verl.trainer
    from hydra import compose, initialize_config_dir
    from verl.utils.config import validate_config

    overrides = [
        f"hydra.searchpath=[file://{Path(__file__).parents[2] / 'recipes'}]",
        "+hardware=cpu",
        "trainer.n_gpus_per_node=2",
        "actor_rollout_ref.actor.use_dynamic_bsz=true",
        "algorithm.adv_estimator=grpo",
    ]
    with initialize_config_dir(str(Path(verl.trainer.__file__).parent / "config"), version_base=None):
        config = compose("ppo_trainer", overrides)
    validate_config(config, use_reference_policy=False, use_critic=False)
    assert config.ray_kwargs.ray_init.num_gpus == 2
    assert config.actor_rollout_ref.rollout.name == "hf"
    assert config.actor_rollout_ref.actor.fsdp_config.strategy == "fsdp2"


@pytest.mark.parametrize(("mode", "name"), [("sync", "ReplayBuffer"), ("colocate_async", "ReplayBufferAsync")])
def test_the_sampler_is_verls_own_with_a_shorter_interval(mode, name):
    from verl_sspo.cpu.sampler import POLL_INTERVAL, quick_replay_buffer

    buffer = quick_replay_buffer(
        trainer_mode=mode,
        trainer_config={},
        max_off_policy_threshold=8,
        max_off_policy_strategy="drop",
        sampler_kwargs={},
        refill_fn=None,
    )
    assert type(buffer).__name__ == name
    assert buffer.poll_interval == POLL_INTERVAL
