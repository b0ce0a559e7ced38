"""`verl-sspo quickstart` up to the training, which the end-to-end tests run."""

import pytest
from omegaconf import OmegaConf

from verl_sspo.compose import compose_config
from verl_sspo.data import language_model
from verl_sspo.quickstart import command
from verl_sspo.run import train


@pytest.fixture
def started(tmp_path, monkeypatch):
    """The arguments of the trainings that would have started, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    given = []

    def run(arguments):
        given.append(arguments)
        return 1  # nothing to draw

    monkeypatch.setattr(train, "run", run)
    return given


def with_model(monkeypatch):
    monkeypatch.setattr(language_model, "main", lambda _: 0)


def test_the_tiny_model_by_default(started):
    command.main(["algo=gspo"])
    (arguments,) = started
    assert (arguments.task, arguments.overrides) == ("quickstart", ["algo=gspo"])
    assert arguments.words == ["quickstart"]


@pytest.mark.parametrize(("bf16", "hardware"), [(True, ["hardware=cpu_bf16"]), (False, [])])
def test_the_language_model_gets_its_problems_and_the_faster_number_format(
    bf16, hardware, started, monkeypatch, tmp_path
):
    with_model(monkeypatch)
    monkeypatch.setattr(command, "has_bf16", lambda: bf16)
    command.main(["--model", "smollm2-135m", "algo=grpo"])
    (arguments,) = started
    assert arguments.task == "word_problems"
    assert arguments.overrides == ["algo=grpo", *hardware]
    assert (tmp_path / "data/word-problems/val.parquet").exists()


def test_hardware_that_is_named_stays(started, monkeypatch):
    with_model(monkeypatch)
    monkeypatch.setattr(command, "has_bf16", lambda: True)
    command.main(["--model", "smollm2-135m", "hardware=cpu"])
    assert started[0].overrides == ["hardware=cpu"]


def test_without_a_model_it_says_so_in_one_line_and_leaves_nothing(started, monkeypatch, tmp_path, capsys):
    def load(_):
        raise language_model.ModelError("the hub cannot be reached")

    monkeypatch.setattr(language_model, "load", load)
    assert command.main(["--model", "smollm2-135m"]) == 1
    assert not started
    *plan, last = capsys.readouterr().err.splitlines()
    assert last == "prepare-model: the hub cannot be reached"
    assert "minutes" in " ".join(plan)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("lesson", command.LESSONS.values(), ids=command.LESSONS)
def test_the_plan_is_that_of_the_recipe(lesson):
    config = compose_config(lesson.task, [])
    assert f"{config.trainer.total_training_steps} steps" in lesson.plan
    assert not OmegaConf.missing_keys(config.trainer)
    lesson.caption.format(config=config)
