"""The server of the rollout `hf` without Ray, and the replay buffer of hardware=cpu."""

import asyncio
import threading
from pathlib import Path

import pytest
import torch
from moe_model import create_moe_model

from verl_sspo.quickstart.model import create_model, create_tokenizer


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

    from verl_sspo.hf.rollout import HFServer

    def make(replica_rank=0, **options) -> HFServer:
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
        return HFServer(config, model_config, replica_rank)

    return make


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
        ({"top_p": 2.0}, "impossible sampling parameters"),
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


def test_a_group_of_responses_does_not_depend_on_the_replica_and_single_requests_differ_between_replicas(make_server):
    def samples(replica, **more):
        output = asyncio.run(make_server(replica).generate([49, 43, 50], {"temperature": 2.0}, "a", **more))
        return [each.token_ids for each in output.extra_fields.get("responses", [output])]

    assert samples(0, n=3) == samples(1, n=3)
    assert samples(0) != samples(1)


def test_weights_of_the_trainer_take_effect(make_server, model_path):
    trained = create_model(create_tokenizer(), seed=1).state_dict()
    server = make_server(load_format="dummy")

    async def update_and_ask():
        with pytest.raises(RuntimeError, match="no weights yet"):
            await ask(server)
        half = len(trained) // 2
        await server.update_weights(dict(list(trained.items())[:half]))
        with pytest.raises(ValueError, match="lack model"):
            await server.finish_update(global_steps=0)
        await server.update_weights(dict(list(trained.items())[half:]))
        await server.finish_update(global_steps=3)
        return await ask(server, temperature=0)

    output = asyncio.run(update_and_ask())
    assert output.extra_fields["global_steps"] == 3
    for name, parameter in server.model.state_dict().items():
        assert torch.equal(parameter, trained[name])


def test_foreign_weights_are_refused(make_server):
    server = make_server()

    async def update():
        with pytest.raises(ValueError, match=r"model\.no_such\.weight, which the rollout's model lacks"):
            await server.update_weights({"model.no_such.weight": torch.zeros(1)})
        with pytest.raises(ValueError, match=r"model\.norm\.weight of shape \(1,\), the rollout's model has \(64,\)"):
            await server.update_weights({"model.norm.weight": torch.zeros(1)})

    asyncio.run(update())


def test_the_model_leaves_its_device_during_the_update(make_server):
    """Records the devices that the model moves to. The server's own is one that this machine does not have."""
    server = make_server(free_cache_engine=True, dtype="bfloat16")
    assert next(server.model.parameters()).dtype == torch.bfloat16
    before, moves = asyncio.run(ask(server)), []
    server.model.to = moves.append
    server.device = torch.device("cuda")

    async def sleep_and_wake():
        await server.sleep()
        await server.wake_up()
        server._asked.clear()
        return await ask(server)

    assert asyncio.run(sleep_and_wake()).token_ids == before.token_ids
    assert moves == [torch.device("cpu"), torch.device("cuda")]


def test_stacked_experts_take_the_weights_that_verl_sends_one_by_one(tmp_path):
    from verl.workers.config import HFModelConfig, RolloutConfig
    from verl.workers.engine.fsdp.utils import unfuse_moe_params

    from verl_sspo.hf.rollout import HFServer

    create_moe_model(seed=0).save_pretrained(tmp_path)
    create_tokenizer().save_pretrained(tmp_path)
    trained = create_moe_model(seed=1)
    config = RolloutConfig(name="hf", tensor_model_parallel_size=1, dtype="float32", load_format="auto")
    model_config = HFModelConfig(path=str(tmp_path), override_config={"attn_implementation": "sdpa"})
    server = HFServer(config, model_config, replica_rank=0)
    sent = dict(unfuse_moe_params(trained.state_dict().items(), "qwen3_moe"))
    assert "model.layers.0.mlp.experts.1.gate_proj.weight" in sent

    async def update():
        await server.update_weights(sent)
        await server.finish_update(1)

    asyncio.run(update())
    own = server.model.state_dict()
    assert own.keys() == trained.state_dict().keys()
    assert all(torch.equal(weight, own[name]) for name, weight in trained.state_dict().items())


def test_a_group_is_drawn_by_one_request(make_server):
    async def ask_both_ways():
        group = await make_server().generate([49, 43, 50], {"temperature": 2.0}, "group", n=6)
        server = make_server()
        one_each = await asyncio.gather(*[ask(server, str(i), temperature=2.0) for i in range(6)])
        return group.extra_fields["responses"], one_each

    group, one_each = asyncio.run(ask_both_ways())
    assert [(o.token_ids, o.log_probs) for o in group] == [(o.token_ids, o.log_probs) for o in one_each]
    assert len({tuple(o.token_ids) for o in group}) == 6


def test_an_error_of_the_model_reaches_all_requests_and_the_server_goes_on(make_server):
    server = make_server()

    def fail(*_):
        raise MemoryError("no memory left")

    async def ask_three():
        return await asyncio.gather(*[ask(server, str(i)) for i in range(3)], return_exceptions=True)

    hook = server.model.register_forward_pre_hook(fail)
    assert [str(error) for error in asyncio.run(ask_three())] == ["no memory left"] * 3
    hook.remove()
    assert asyncio.run(ask(server)).stop_reason == "completed"


def test_a_cancelled_request_does_not_fail_its_neighbours(make_server):
    server = make_server()
    started, go_on = threading.Event(), threading.Event()

    def hold(*_):
        started.set()
        go_on.wait(timeout=60)

    async def cancel_one():
        hook = server.model.register_forward_pre_hook(hold)
        cancelled, other = asyncio.create_task(ask(server, "a")), asyncio.create_task(ask(server, "b"))
        await asyncio.to_thread(started.wait, 60)
        cancelled.cancel()
        hook.remove()
        go_on.set()
        return await other

    assert asyncio.run(cancel_one()).stop_reason == "completed"


def test_abort_returns_what_there_is_and_later_requests_wait(make_server):
    server = make_server(ignore_eos=True, max_model_len=4000, response_length=3900)

    async def abort_and_resume():
        running = asyncio.create_task(ask(server))
        while not server.generator.unfinished:
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


def test_a_replica_of_several_ranks_is_refused():
    from verl.workers.config import RolloutConfig

    from verl_sspo.hf.rollout import check_rollout_config

    with pytest.raises(ValueError, match="its replica would span 2"):
        check_rollout_config(RolloutConfig(name="hf"))  # verl's default is tensor_model_parallel_size=2


def compose(*overrides):
    import hydra
    import verl.trainer

    recipes = f"hydra.searchpath=[file://{Path(__file__).parents[2] / 'recipes'}]"
    with hydra.initialize_config_dir(str(Path(verl.trainer.__file__).parent / "config"), version_base=None):
        return hydra.compose("ppo_trainer", [recipes, *overrides])


def test_the_recipe_is_valid():
    from verl.utils.config import validate_config

    config = compose(
        "+hardware=cpu",
        "trainer.n_gpus_per_node=2",
        "actor_rollout_ref.actor.use_dynamic_bsz=true",
        "algorithm.adv_estimator=grpo",
    )
    validate_config(config, use_reference_policy=False, use_critic=False)
    assert config.ray_kwargs.ray_init.num_gpus == 2
    assert config.actor_rollout_ref.rollout.name == "hf"
    assert config.actor_rollout_ref.actor.fsdp_config.strategy == "fsdp2"


class Trainer:
    """The parts of verl's trainer that build a replay buffer."""

    def __init__(self, *overrides):
        from verl.trainer.ppo.v1.trainer_base import PPOTrainer

        self.config = compose("+hardware=cpu", *overrides)
        self.trainer_mode = self.config.trainer.v1.trainer_mode
        self._resolve_filter_groups_metric = lambda: PPOTrainer._resolve_filter_groups_metric(self)
        self._build_replay_buffer = lambda: PPOTrainer._build_replay_buffer(self)

    def _add_prompts_to_generate(self, count):
        pass


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"name": "ReplayBuffer", "filter_groups_metric": None}),
        (["trainer.v1.trainer_mode=colocate_async"], {"name": "ReplayBufferAsync", "filter_groups_metric": None}),
        (
            ["+algorithm.filter_groups={enable: true, metric: acc, max_inflight_gen_batches: 3}"],
            {"name": "ReplayBuffer", "filter_groups_metric": "acc", "max_inflight_gen_batches": 3, "gen_batch_size": 1},
        ),
        (
            ["++trainer.v1.sampler.sync_refill_failed_groups=true"],
            {"name": "ReplayBuffer", "sync_refill_failed_groups": True, "gen_batch_size": 1},
        ),
    ],
)
def test_the_replay_buffer_is_verls_own_with_its_settings_and_a_shorter_interval(overrides, expected):
    from verl_sspo.hf.sampler import POLL_INTERVAL

    buffer = Trainer(*overrides)._build_replay_buffer()
    assert buffer.poll_interval == POLL_INTERVAL
    assert {"name": type(buffer).__name__, **vars(buffer)}.items() >= expected.items()
