import asyncio
import uuid
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from verl.protocol import DataProto
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, get_adv_estimator_fn

from verl_sspo.algorithm.advantage import group_relative_advantages


def sspo_advantages(rewards, index, mask=None, **algorithm):
    """Calls the estimator of verl's registry. A response's reward is on its last token, as in verl's reward loop."""
    mask = torch.ones(len(rewards), 3, dtype=torch.bool) if mask is None else mask
    token_level_rewards = torch.zeros(mask.shape)
    token_level_rewards[:, -1] = torch.as_tensor(rewards)
    estimator = get_adv_estimator_fn("sspo")
    return estimator(
        token_level_rewards=token_level_rewards,
        response_mask=mask,
        index=np.array(index, dtype=object),
        config=OmegaConf.create(algorithm),
        reward_baselines=None,
    )[0]


def test_by_hand():
    # Two groups, interleaved: rewards 1, 0, 0, 0 (mean 1/4, std 1/2) and 3, 1 (mean 2, std sqrt 2).
    advantages = sspo_advantages([1.0, 3.0, 0.0, 0.0, 1.0, 0.0], ["a", "b", "a", "a", "b", "a"])[:, 0]
    expected = [0.75 / 0.5, 1 / 2**0.5, -0.25 / 0.5, -0.25 / 0.5, -1 / 2**0.5, -0.25 / 0.5]
    torch.testing.assert_close(advantages, torch.tensor(expected), rtol=3e-6, atol=0)


@given(data=st.data(), normalize=st.booleans(), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_equals_verls_grpo(data, normalize, seed):
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=12))
    rng = np.random.default_rng(seed)
    index = np.array([str(uuid.UUID(int=g)) for g, size in enumerate(sizes) for _ in range(size)], dtype=object)
    rng.shuffle(index)
    mask = torch.from_numpy(rng.random((len(index), 5)) < 0.7)
    token_level_rewards = torch.from_numpy(rng.normal(size=mask.shape)).float()
    ours, returns = get_adv_estimator_fn("sspo")(
        token_level_rewards=token_level_rewards,
        response_mask=mask,
        index=index,
        config=OmegaConf.create({"norm_adv_by_std_in_grpo": normalize}),
    )
    # In float64, so that no difference comes from grpo's float32 rounding.
    theirs, _ = compute_grpo_outcome_advantage(
        token_level_rewards.sum(-1, keepdim=True).double(), mask[:, :1] | True, index, norm_adv_by_std_in_grpo=normalize
    )
    torch.testing.assert_close(ours.double(), theirs * mask, rtol=1e-6, atol=1e-6)
    assert returns is ours


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_mask_of_any_type_is_read_and_left_as_it_was(dtype):
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]], dtype=dtype)
    before = mask.clone()
    advantages = sspo_advantages([1.0, 0.0], ["a", "a"], mask)
    half = 0.5**0.5
    torch.testing.assert_close(advantages, torch.tensor([[half] * 3, [0, -half, -half]]), rtol=3e-6, atol=0)
    assert mask.equal(before)


@pytest.mark.parametrize("reward", [0.1, 1.0, -3.7, 1e8])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_equal_rewards_give_exactly_zero(reward, baseline):
    advantages = sspo_advantages([reward] * 7 + [0.0, 1.0], ["a"] * 7 + ["b"] * 2, sspo={"baseline": baseline})
    assert (advantages[:7] == 0).all()
    assert (advantages[7:] != 0).all()


def test_leave_one_out_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.5])
    groups = torch.zeros(3, dtype=torch.int64)
    advantages = group_relative_advantages(rewards, groups, baseline="leave_one_out", normalize_by_std=False)
    torch.testing.assert_close(advantages, torch.tensor([1.0 - 0.25, 0.0 - 0.75, 0.5 - 0.5]))


def test_std_floor_damps_a_lone_success():
    rewards = [1.0] + [0.0] * 15  # std 0.25
    plain = sspo_advantages(rewards, ["a"] * 16)
    floored = sspo_advantages(rewards, ["a"] * 16, sspo={"std_floor": 0.5})
    torch.testing.assert_close(floored, plain / 2, rtol=1e-5, atol=0)


def test_a_nonfinite_reward_stays_in_its_group():
    advantages = sspo_advantages([float("nan"), 1.0, 0.0, 1.0], ["a", "a", "b", "b"])
    assert advantages[:2].isnan().all()
    assert advantages[2:].isfinite().all()


@pytest.mark.parametrize("rewards", [[float("inf")], [float("inf"), 0.0, 1.0], [0.0, float("-inf")]])
def test_an_infinite_reward_never_gives_a_number(rewards):
    groups = torch.zeros(len(rewards), dtype=torch.int64)
    for normalize_by_std in (True, False):
        advantages = group_relative_advantages(torch.tensor(rewards), groups, normalize_by_std=normalize_by_std)
        assert advantages.isnan().all()


def test_an_index_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="2 entries for 3 responses"):
        sspo_advantages([1.0, 0.0, 1.0], ["a", "a"])


def of_sessions(estimator, rewards, keys, mask):
    """Advantages as verl's V1 trainer computes them, for outputs with keys {uid}_{session}_{output}."""
    # Not at the top: this import makes verl choose its platform.
    from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

    data = DataProto.from_dict(
        {
            "token_level_rewards": torch.nn.functional.pad(torch.tensor(rewards).unsqueeze(-1), (0, mask.shape[1] - 1)),
            "response_mask": mask,
        },
        non_tensors={"uid": np.array([key.rsplit("_", 2)[0] for key in keys], dtype=object)},
    )
    config = OmegaConf.create({"norm_adv_by_std_in_grpo": True})
    return compute_advantage_for_multi_trajectories(data, keys, estimator, config=config).batch["advantages"]


def test_a_session_of_several_outputs_counts_once_as_in_verls_grpo():
    keys = ["u_0_0"] + [f"u_1_{output}" for output in range(10)]
    advantages = of_sessions("sspo", [1.0] + [0.0] * 10, keys, torch.ones(11, 2, dtype=torch.int64))
    expected = torch.tensor([0.5**0.5] + [-(0.5**0.5)] * 10).unsqueeze(-1).expand(11, 2)
    torch.testing.assert_close(advantages, expected, rtol=3e-6, atol=0)


@given(
    outputs=st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(0, 3), st.integers(0, 12)), min_size=1, max_size=20, unique=True
    ),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=100)
def test_sessions_of_any_sizes_order_and_masks_equal_verls_grpo(outputs, seed):
    generator = torch.Generator().manual_seed(seed)
    keys = [f"{uid}_1_{session}_{output}" for uid, session, output in outputs]
    rewards = torch.randint(0, 3, (len(keys),), generator=generator).float().tolist()
    mask = torch.randint(0, 2, (len(keys), 3), generator=generator)
    theirs = of_sessions("grpo", rewards, keys, mask)
    torch.testing.assert_close(of_sessions("sspo", rewards, keys, mask), theirs, rtol=1e-5, atol=1e-5)


def test_sessions_arrive_from_verls_agent_loop_through_its_trainer(monkeypatch):
    """The estimator reads a stack frame of verl (`registration._output_keys`). If verl changes it, this test fails."""
    from transfer_queue import KVBatchMeta
    from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput
    from verl.trainer.ppo.v1 import agent_loop_tq, trainer_base
    from verl.utils.tensordict_utils import list_of_dict_to_tensordict

    rows, advantages = {}, []

    async def put(keys, fields, **_):
        rows.update(zip(keys, fields, strict=True))

    async def nothing(*_, **__):
        pass

    def get(keys, select_fields, **_):
        return list_of_dict_to_tensordict([{f: rows[key][f] for f in select_fields if f in rows[key]} for key in keys])

    def output(reward, length):
        ids = [7] * length
        return AgentLoopOutput(
            prompt_ids=[1],
            response_ids=ids,
            response_mask=[1] * length,
            reward_score=reward,
            metrics=AgentLoopMetrics(),
        )

    worker = SimpleNamespace(
        _compute_score=nothing,
        _compute_teacher_logprobs=nothing,
        _compute_multi_modal_inputs=lambda *_: {},
        _compute_position_ids=lambda ids, *_: torch.zeros_like(ids),
    )
    monkeypatch.setattr(agent_loop_tq.tq, "async_kv_batch_put", put)
    for session, outputs in enumerate(([output(1.0, 2)], [output(0.0, 1 + i % 3) for i in range(10)])):
        for each in outputs:
            each.extra_fields["reward_extra_info"] = {}
        store = agent_loop_tq.AgentLoopWorkerTQ.__ray_actor_class__._agent_loop_postprocess
        asyncio.run(store(worker, outputs, False, uid="u", session_id=session, global_steps=1))
    monkeypatch.setattr(trainer_base.tq, "kv_batch_get", get)
    monkeypatch.setattr(trainer_base.tq, "kv_batch_put", lambda fields, **_: advantages.append(fields["advantages"]))
    algorithm = {"adv_estimator": "sspo", "gamma": 1, "lam": 1, "use_kl_in_reward": False}
    trainer = SimpleNamespace(
        config=OmegaConf.create({"algorithm": algorithm, "actor_rollout_ref": {"rollout": {"n": 2}}})
    )
    batch = KVBatchMeta(keys=list(rows), partition_id="train", tags=[{} for _ in rows])
    trainer_base.PPOTrainer._compute_advantage(trainer, batch, {})
    first_tokens = advantages[0].to_padded_tensor(0)[:, 0]
    torch.testing.assert_close(first_tokens, torch.tensor([0.5**0.5] + [-(0.5**0.5)] * 10), rtol=3e-6, atol=0)
