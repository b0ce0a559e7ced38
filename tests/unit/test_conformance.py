"""The loss inside verl's own `ppo_loss`, fed as its engines feed it: ragged, without padding, split over ranks."""

import pytest
import torch
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPActorConfig, McoreActorConfig
from verl.workers.utils.losses import ppo_loss

from verl_sspo.algorithm.gates import Gate
from verl_sspo.algorithm.reference import sspo_loss_matrix
from verl_sspo.config import SSPOPolicyLossConfig

PROMPTS, RESPONSES = [3, 1, 2, 4, 2, 1], [5, 2, 7, 1, 3, 6]
MODES = ["seq-mean-token-mean", "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm"]


def nested(tensors):
    return torch.nested.as_nested_tensor(list(tensors), layout=torch.jagged)


@pytest.fixture
def rows():
    """Six responses: one without a valid token (verl's padding rows), one with a masked tool call inside."""
    generator = torch.Generator().manual_seed(0)

    def draw(lengths, scale=1.0):
        return [scale * torch.randn(length, generator=generator) for length in lengths]

    masks = [torch.ones(length, dtype=torch.int64) for length in RESPONSES]
    masks[1][:] = 0
    masks[2][2:4] = 0
    old_log_probs = [-x.abs() for x in draw(RESPONSES)]
    return {
        "old_log_probs": old_log_probs,
        "log_probs": [old + move for old, move in zip(old_log_probs, draw(RESPONSES, 0.2), strict=True)],
        "advantages": [
            advantage * mask for advantage, mask in zip(torch.randn(6, generator=generator), masks, strict=True)
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


def loss_of(config, rows, chosen, dp_size):
    """verl's ppo_loss on some of the rows, and the gradient of every response's log-probs."""
    # The engine's output: one value a token of prompt and response, shifted left by one.
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
                name: nested(rows[name][i] for i in chosen) for name in ("old_log_probs", "advantages", "response_mask")
            },
        },
        batch_size=[len(chosen)],
    )
    tu.assign_non_tensor(
        data,
        dp_size=dp_size,
        batch_num_tokens=int(sum(mask.sum() for mask in rows["response_mask"])),
        global_batch_size=len(RESPONSES),
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
    whole, gradients, metrics = loss_of(config, rows, range(6), dp_size=1)

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
    for rank in ([[0, 1], [2]], [[3], [5, 4]]):  # two data-parallel ranks of two micro-batches each
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
    assert metrics["sspo/sequences"].aggregate() == 5
