"""The plain trainer computes what verl's trainer would: log-probs, updates and metrics match row-by-row formulas."""

import json
from copy import deepcopy

import pandas as pd
import pytest
import torch
from verl.trainer.ppo.core_algos import agg_loss

from verl_sspo.algorithm.gates import Gate
from verl_sspo.algorithm.reference import sspo_loss_matrix
from verl_sspo.compose import RECIPES, compose_config
from verl_sspo.experiments import plain
from verl_sspo.quickstart.model import prepare_arithmetic

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14]]
RESPONSES = [[20, 21, 22, 23], [24], [25, 26], [27, 28, 29], [30, 31, 32, 33], [34, 35]]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return prepare_arithmetic(
        tmp_path_factory.mktemp("arithmetic"), digits=1, train_size=40, val_size=12, warm_up_steps=20, warm_up_batch=8
    )


def settings(task, *overrides):
    return [
        *("task.digits=1", f"task.folder={task}", "data.train_batch_size=4", "trainer.total_training_steps=2"),
        *("actor_rollout_ref.actor.ppo_mini_batch_size=2", "actor_rollout_ref.rollout.n=3", *overrides),
    ]


def trainer(task, *overrides):
    return plain.Trainer(compose_config("quickstart", settings(task, *overrides), RECIPES))


def row_by_row(model, i):
    """Log-probs of one response alone, without padding and without a shared prompt."""
    prompt, response = PROMPTS[i // 2], RESPONSES[i]
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]


def test_log_probs_are_those_of_each_response_by_itself(task):
    made = trainer(task)
    groups = plain.Groups(PROMPTS, RESPONSES, 2)
    log_probs, distribution = made.log_probs(groups)
    assert groups.mask.sum(-1).tolist() == [4, 1, 2, 3, 4, 2]
    for i in range(len(RESPONSES)):
        torch.testing.assert_close(log_probs[i][groups.mask[i]], row_by_row(made.model, i), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(distribution.exp().sum(-1), torch.ones_like(log_probs))
    part = groups.select(torch.tensor([2, 0]))
    torch.testing.assert_close(made.log_probs(part)[0], log_probs[[4, 5, 0, 1]], rtol=1e-4, atol=1e-5)


def test_an_update_is_adam_with_the_gradient_of_the_formula(task):
    made = trainer(task, "actor_rollout_ref.actor.optim.clip_grad=1e9")
    other = deepcopy(made.model)
    groups = plain.Groups(PROMPTS, RESPONSES, 2)
    generator = torch.Generator().manual_seed(0)
    old = made.log_probs(groups)[0].detach() + 0.1 * torch.randn(groups.mask.shape, generator=generator)
    advantages = torch.randn(6, 1, generator=generator).expand_as(old)
    metrics = made.update(groups, torch.arange(3), old, advantages)

    log_prob = torch.stack(
        [torch.nn.functional.pad(row_by_row(other, i), (0, 4 - len(RESPONSES[i]))) for i in range(6)]
    )
    matrix = sspo_loss_matrix(log_prob, old, advantages, groups.mask, Gate())
    agg_loss(matrix, groups.mask, "seq-mean-token-mean").backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in other.parameters()])
    assert metrics["actor/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    optim = made.config.actor_rollout_ref.actor.optim
    torch.optim.AdamW(other.parameters(), lr=optim.lr, weight_decay=optim.weight_decay).step()
    for ours, theirs in zip(made.model.parameters(), other.parameters(), strict=True):
        # Adam divides by the size of the gradient: where that is only rounding, the step's direction is arbitrary.
        close = (ours - theirs).abs() < 1e-2 * optim.lr
        assert close.float().mean() > 0.99


def test_it_writes_what_a_suite_reads_and_repeats_itself(task, tmp_path):
    runs = []
    for name in ("a", "b"):
        options = {"config_dir": RECIPES, "config_name": "quickstart"}
        file = plain.train(settings(task, "algo=sspo_sequence"), tmp_path / name, **options)
        runs.append([json.loads(line) for line in file.read_text().splitlines()])
    assert runs[0] == runs[1]
    assert [row["step"] for row in runs[0]] == [0, 1, 2]
    logged = pd.DataFrame([row["data"] for row in runs[0]])
    assert logged["val-core/arithmetic/acc/mean@1"].notna().tolist() == [True, False, True]
    assert logged.loc[1:, "critic/score/mean"].between(0, 1).all()
    assert logged.loc[1:, "actor/entropy"].gt(0).all()
    assert logged.loc[1:, "actor/sspo/slope"].between(0, 1).all()


def test_settings_that_it_does_not_read_are_an_error(task):
    with pytest.raises(ValueError, match=r"does not read actor_rollout_ref.actor.use_kl_loss=True: leave it at False"):
        trainer(task, "actor_rollout_ref.actor.use_kl_loss=true")
