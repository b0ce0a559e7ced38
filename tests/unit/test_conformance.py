"""The loss in verl's own `ppo_loss`, with inputs as from verl's engines: ragged, without padding, split over ranks."""

import math

import pytest
import torch
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils import tensordict_utils as tu
from verl.utils.metric import Metric, reduce_metrics
from verl.utils.py_functional import append_to_dict
from verl.workers.config import FSDPActorConfig, McoreActorConfig
from verl.workers.utils.losses import ppo_loss

from verl_sspo.algorithm.gates import Gate
from verl_sspo.algorithm.reference import sspo_loss_matrix
from verl_sspo.config import SSPOPolicyLossConfig

PROMPTS, RESPONSES = [3, 1, 2, 4, 2, 1, 5, 1], [5, 2, 7, 1, 3, 6, 30, 1]
SIZE = len(RESPONSES)
ROWS = range(SIZE)
# Rows without a valid token, like verl's padding rows.
EMPTY = [1, 7]
MODES = ["seq-mean-token-mean", "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm"]


def nested(tensors):
    return torch.nested.as_nested_tensor(list(tensors), layout=torch.jagged)


@pytest.fixture
def rows():
    """Eight responses: two without a valid token, one of many tokens, one with a masked tool call inside."""
    generator = torch.Generator().manual_seed(0)

    def draw(lengths, scale=1.0):
        return [scale * torch.randn(length, generator=generator) for length in lengths]

    masks = [torch.ones(length, dtype=torch.int64) for length in RESPONSES]
    for row in EMPTY:
        masks[row][:] = 0
    masks[2][2:4] = 0
    old_log_probs = [-x.abs() for x in draw(RESPONSES)]
    return {
        "old_log_probs": old_log_probs,
        "log_probs": [old + move for old, move in zip(old_log_probs, draw(RESPONSES, 0.2), strict=True)],
        "advantages": [
            advantage * mask
            for advantage, mask in zip(torch.randn(len(RESPONSES), generator=generator), masks, strict=True)
        ],
        "response_mask": masks,
    }


def config_of(cls, mode):
    return cls(
        rollout_n=2,
        ppo_micro_batch_size_per_gpu=2,
        loss_agg_mode=mode,
        policy_loss=SSPOPolicyLossConfig(loss_mode="sspo", tau_pos=2.0, tau_neg=3.0),
        loss_scale_factor=8 if mode == "seq-mean-token-sum-norm" else None,
        **({"strategy": "fsdp2"} if cls is FSDPActorConfig else {}),
    )


def loss_of(config, rows, chosen, dp_size, size=SIZE):
    """verl's ppo_loss on some of the rows of a mini-batch of `size`, and the gradient of each response's log-probs."""
    chosen = list(chosen)
    # The engine's output: one value per token of prompt and response, shifted left by one.
    leaves = [rows["log_probs"][i].clone().requires_grad_() for i in chosen]
    outputs = [
        torch.cat([torch.zeros(PROMPTS[i] - 1), leaf, torch.full((1,), torch.nan)])
        for i, leaf in zip(chosen, leaves, strict=True)
    ]
    data = TensorDict(
        {
            "prompts": nested(torch.zeros(PROMPTS[i], dtype=torch.int64) for i in chosen),
            "responses": nested(torch.zeros(RESPONSES[i], dtype=torch.int64) for i in chosen),
            **{
                name: nested(rows[name][i] for i in chosen)
                for name in ("old_log_probs", "advantages", "response_mask", "rollout_is_weights")
                if name in rows
            },
        },
        batch_size=[len(chosen)],
    )
    tu.assign_non_tensor(
        data,
        dp_size=dp_size,
        batch_num_tokens=int(sum(mask.sum() for mask in rows["response_mask"])),
        global_batch_size=size,
    )
    loss, metrics = ppo_loss(
        config,
        {
            "log_probs": torch.nested.nested_tensor_from_jagged(
                torch.cat(outputs), torch.tensor([0, *(len(o) for o in outputs)]).cumsum(0)
            )
        },
        data,
    )
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in leaves], metrics


@pytest.mark.parametrize("cls", [FSDPActorConfig, McoreActorConfig])
@pytest.mark.parametrize("mode", MODES)
def test_ranks_and_micro_batches_give_the_loss_of_the_mini_batch(rows, cls, mode):
    config = config_of(cls, mode)
    whole, gradients, metrics = loss_of(config, rows, ROWS, dp_size=1)

    padded = {
        name: torch.nn.utils.rnn.pad_sequence(
            values, batch_first=True, padding_value=torch.nan if name == "log_probs" else 0
        )
        for name, values in rows.items()
    }
    matrix = sspo_loss_matrix(
        padded["log_probs"],
        padded["old_log_probs"],
        padded["advantages"],
        padded["response_mask"],
        Gate.of_policy_loss(config.policy_loss),
    )
    plain = agg_loss(matrix, padded["response_mask"], mode, **config.global_batch_info)
    torch.testing.assert_close(whole, plain)

    total, split = torch.zeros(()), {}
    for rank in ([[0, 1], [2, 6]], [[3], [5, 4, 7]]):  # two data-parallel ranks of two micro-batches each
        for chosen in rank:
            loss, parts, part_metrics = loss_of(config, rows, chosen, dp_size=2)
            total += loss / 2
            split.update(zip(chosen, (part / 2 for part in parts), strict=True))
            assert part_metrics.keys() == metrics.keys()
    torch.testing.assert_close(total, whole)
    for i, gradient in enumerate(gradients):
        torch.testing.assert_close(split[i], gradient)
    assert (gradients[1] == 0).all()
    assert (gradients[2][2:4] == 0).all()


def logged(config, rows, ranks, size=SIZE):
    """The metrics that verl logs for one update. A rank is a list of micro-batches, a micro-batch is a list of rows.

    Reduced as verl's engine, worker and trainer do: over micro-batches, ranks and mini-batches.
    """
    of_ranks = []
    for micro_batches in ranks:
        of_ranks.append({})
        for chosen in micro_batches:
            append_to_dict(of_ranks[-1], loss_of(config, rows, chosen, len(ranks), size)[2])
    if len(ranks) > 1:
        of_ranks = [{name: Metric.aggregate_dp([rank[name] for rank in of_ranks]) for name in of_ranks[0]}]
    of_updates: dict = {}
    append_to_dict(of_updates, of_ranks[0])
    return {name: float(value) for name, value in reduce_metrics(of_updates).items()}


def rejecting(rows):
    """Adds rollout weights. Some are 0, and for response 4 all are."""
    generator = torch.Generator().manual_seed(1)
    weights = [
        (torch.rand(length, generator=generator) + 0.5).masked_fill_(torch.rand(length, generator=generator) < 0.2, 0.0)
        for length in RESPONSES
    ]
    weights[4][:] = 0.0
    return rows | {"rollout_is_weights": weights}


def with_a_nan(rows):
    log_probs = [values.clone() for values in rows["log_probs"]]
    log_probs[2][1] = math.nan
    return rows | {"log_probs": log_probs}


CUTS = {
    "halves": [[[0, 1, 2, 3], [4, 5, 6, 7]]],
    "three and five": [[[0, 1, 2], [3, 4, 5, 6, 7]]],
    "single rows": [[[row] for row in ROWS]],
    "an empty micro-batch": [[EMPTY, [0, 2, 3, 4, 5, 6]]],
    "another order": [[[7, 3, 5], [6, 1], [0, 4, 2]]],
    "two ranks": [[[0, 1, 2, 3]], [[4, 5, 6, 7]]],
    "two ranks, micro-batches": [[[0, 1], [2, 3]], [[4], [5, 6, 7]]],
    "two ranks, single rows": [[[0], [1], [2], [3]], [[4], [5], [6], [7]]],
}


@pytest.mark.parametrize("change", [dict, rejecting, with_a_nan])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_diagnostics_do_not_depend_on_micro_batches_and_ranks(rows, cut, change):
    config = config_of(FSDPActorConfig, "seq-mean-token-mean")
    rows = change(rows)
    whole = logged(config, rows, [[list(ROWS)]])
    split = logged(config, rows, cut)
    assert split.keys() == whole.keys()
    assert any(name.startswith("sspo/") for name in whole)
    for name, value in whole.items():
        assert split[name] == pytest.approx(value, rel=1e-5, abs=1e-12, nan_ok=name == "actor/pg_loss"), name


@pytest.mark.parametrize("change", [dict, rejecting])
def test_diagnostics_do_not_depend_on_padding_rows(rows, change):
    """verl's padding rows enlarge the mini-batch, and verl divides by its size."""
    config, rows = config_of(FSDPActorConfig, "seq-mean-token-mean"), change(rows)
    padded = logged(config, rows, [[list(ROWS)]])
    bare = logged(config, rows, [[[row for row in ROWS if row not in EMPTY]]], size=6)
    for name, value in bare.items():
        # The loss and the fraction of responses are relative to all rows.
        scale = 6 / 8 if name in ("actor/pg_loss", "sspo/responses_left_out") else 1
        assert padded[name] == pytest.approx(value * scale, rel=1e-5, abs=1e-12), name


def test_left_out_tokens_and_responses_are_counted(rows):
    rows = rejecting(rows)
    got = logged(config_of(FSDPActorConfig, "seq-mean-token-mean"), rows, CUTS["two ranks, micro-batches"])
    valid, weights = torch.cat(rows["response_mask"]).bool(), torch.cat(rows["rollout_is_weights"])
    assert got["sspo/tokens_left_out"] == pytest.approx((weights[valid] == 0).double().mean().item())
    assert got["sspo/responses_left_out"] == 1 / 8
