"""Evaluation: what verl is asked to do, and how its answers become measures."""

import itertools
import json
import math
import unicodedata
from pathlib import Path

import pandas as pd
import pytest
from verl.trainer.ppo.metric_utils import process_validation_metrics

from verl_sspo.data.schema import make_row, write_rows
from verl_sspo.experiments import evaluate as command
from verl_sspo.experiments import evaluation
from verl_sspo.experiments.evaluation import Evaluation, evaluate, pass_at_k
from verl_sspo.run import launch


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (5, 0), (5, 2), (6, 5), (6, 6)])
def test_pass_at_k_is_the_fraction_of_subsets_with_a_right_answer(n, c):
    answers = [1] * c + [0] * (n - c)
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(answers, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(max, subsets)) / len(subsets))


def write_model(folder):
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).touch()


@pytest.fixture
def benchmarks(tmp_path):
    """Two benchmarks: one problem contains another, two are the same, and one is changed by tokenizers."""
    contents = {
        "easy": [("1+1=?", "2"), ("What is 1+1=?", "2"), ("3 \u212b + 4 \u212b = ? ", "7")],
        "hard": [("x^2=49, x>0", "7"), ("x^2=49, x>0", "7")],
    }
    files = []
    write_model(tmp_path / "model")
    for name, problems in contents.items():
        rows = [
            make_row(
                data_source="math",
                prompt=[{"role": "system", "content": "You are helpful."}, {"role": "user", "content": question}],
                ability="math",
                ground_truth=truth,
                split="test",
                index=i,
            )
            for i, (question, truth) in enumerate(problems)
        ]
        (tmp_path / name).mkdir()
        write_rows(rows, tmp_path / name / "test.parquet")
        files.append(str(tmp_path / name / "test.parquet"))
    return files


@pytest.fixture
def recipes(tmp_path):
    folder = tmp_path / "recipes"
    folder.mkdir()
    (tmp_path / "train.parquet").touch()
    # The recipe's own validation data is not needed and does not exist.
    own = f"data: {{train_files: {tmp_path}/train.parquet, val_files: [{tmp_path}/absent.parquet],"
    own += " val_max_samples: 512, shuffle: true}\n"
    (folder / "toy.yaml").write_text(own)
    return folder


class FakeVerl:
    """Answers every problem n times. The first `right[question, index]` of its answers are right."""

    def __init__(self, right, problems=None):
        self.right = right
        self.problems = problems
        self.overrides = []

    def __call__(self, overrides, run_dir, *, config_dir, config_name, console=None):
        self.overrides.append(overrides)
        settings = dict(each.split("=", 1) for each in overrides)
        files = [each.strip("'") for each in settings["data.val_files"].strip("[]").split(",")]
        n = int(settings["actor_rollout_ref.rollout.val_kwargs.n"])
        lines = []
        for file in files[: 1 if self.problems else None]:
            for i, row in enumerate(pd.read_parquet(file)[: self.problems].itertuples()):
                question = row.prompt[-1]["content"]
                for sample in range(n):
                    right = float(sample < self.right.get((question, i), 0))
                    lines.append(
                        {
                            # A chat template strips the text, a tokenizer normalises it.
                            "input": unicodedata.normalize("NFC", f"user {question.strip()}\nassistant "),
                            "output": f"answer\u2028{sample}",
                            "gts": row.reward_model["ground_truth"],
                            "score": right + 0.5,
                            "acc": right,
                            "uid": f"prompt_{file}_{i}_{sample}_0",
                        }
                    )
        dump = Path(settings["trainer.validation_data_dir"])
        dump.mkdir(parents=True)
        # In another order: verl sorts by random uid.
        (dump / "0.jsonl").write_text(
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in reversed(lines)), encoding="utf-8"
        )
        return run_dir / launch.METRICS


def test_answers_find_their_problems_and_become_measures(tmp_path, benchmarks, recipes):
    fake = FakeVerl({("1+1=?", 0): 4, ("What is 1+1=?", 1): 1, ("x^2=49, x>0", 0): 2})
    output = tmp_path / "out"
    metrics = evaluate(
        tmp_path / "model", Evaluation(benchmarks, samples=4), output, recipe="toy", recipes=recipes, train=fake
    )
    assert metrics["evaluation/easy/greedy"] == pytest.approx(2 / 3)
    assert metrics["evaluation/easy/avg@4"] == pytest.approx((1 + 1 / 4 + 0) / 3)
    assert metrics["evaluation/easy/pass@1"] == metrics["evaluation/easy/avg@4"]
    assert metrics["evaluation/easy/pass@2"] == pytest.approx((1 + (1 - math.comb(3, 2) / math.comb(4, 2))) / 3)
    assert metrics["evaluation/easy/pass@4"] == pytest.approx(2 / 3)
    assert metrics["evaluation/hard/pass@4"] == pytest.approx(1 / 2)
    assert metrics == json.loads((output / evaluation.METRICS).read_text())
    table = pd.read_parquet(output / evaluation.PROBLEMS)
    assert len(table) == 5 * (1 + 4)
    right = table[(table["mode"] == "samples") & (table["benchmark"] == "easy")].groupby("problem")["correct"].sum()
    assert right.tolist() == [4, 1, 0]
    # The two equal problems are kept apart: four answers each.
    assert table[table["benchmark"] == "hard"].groupby(["mode", "problem"]).size().tolist() == [1, 1, 4, 4]


def test_what_verl_is_asked_for(tmp_path, benchmarks, recipes):
    fake = FakeVerl({})
    evaluate(
        tmp_path / "model",
        Evaluation(benchmarks, samples=2, temperature=0.7),
        tmp_path / "out",
        recipe="toy",
        recipes=recipes,
        train=fake,
    )
    greedy, samples = fake.overrides
    assert "trainer.val_only=true" in greedy
    assert "actor_rollout_ref.rollout.val_kwargs.do_sample=false" in greedy
    assert {f"actor_rollout_ref.rollout.val_kwargs.{each}" for each in ("n=2", "temperature=0.7")} <= set(samples)
    assert f"actor_rollout_ref.model.path={tmp_path / 'model'}" in greedy

    checkpoint = tmp_path / "checkpoints" / "global_step_10"
    (checkpoint / "actor").mkdir(parents=True)
    options = {"recipe": "toy", "recipes": recipes, "train": fake}
    evaluate(checkpoint, Evaluation(benchmarks), tmp_path / "out2", **options)
    assert f"trainer.resume_from_path={checkpoint}" in fake.overrides[-1]
    with pytest.raises(FileExistsError):
        evaluate(checkpoint, Evaluation(benchmarks), tmp_path / "out2", **options)
    with pytest.raises(FileNotFoundError, match="no data at"):
        evaluate(checkpoint, Evaluation(["missing.parquet"]), tmp_path / "out4", **options)


@pytest.mark.parametrize("truth", [["1", "2"], [3], ["x"], "5"])
def test_ground_truths_are_the_same_in_the_rows_and_in_the_dump(tmp_path, truth):
    (tmp_path / "b").mkdir()
    row = {"prompt": [{"role": "user", "content": "1+1"}], "reward_model": {"ground_truth": truth}}
    pd.DataFrame([row]).to_parquet(tmp_path / "b" / "test.parquet")
    (tmp_path / "dump").mkdir()
    line = {"input": "user 1+1", "output": "", "gts": truth, "score": 1.0, "uid": "p_0_0"}
    (tmp_path / "dump" / "0.jsonl").write_text(json.dumps(line) + "\n")
    problems = evaluation.read_benchmarks([str(tmp_path / "b" / "test.parquet")])
    joined = evaluation.join(problems, evaluation.read_generations(tmp_path / "dump"))
    assert joined["problem"].tolist() == [0]


def test_answers_that_did_not_come_back_count_as_wrong():
    problems = pd.DataFrame({"benchmark": ["b", "b"], "problem": [0, 1]})
    answers = pd.DataFrame({"mode": "samples", "benchmark": "b", "problem": [0, 0, 0], "correct": [True, True, True]})
    metrics = evaluation.summarize(answers, problems, {"greedy": 1, "samples": 4})
    assert metrics["evaluation/b/avg@4"] == 3 / 8
    assert metrics["evaluation/b/missing@samples"] == 5
    assert metrics["evaluation/b/greedy"] == 0


def test_an_answer_to_no_problem_is_an_error(benchmarks):
    problems = evaluation.read_benchmarks(benchmarks)
    stranger = pd.DataFrame({"group": ["g"], "sample": [0], "prompt": ["2+2"], "ground_truth": ["4"]})
    with pytest.raises(ValueError, match="belongs to no problem"):
        evaluation.join(problems, stranger)


def test_avg_at_k_is_what_verl_reports():
    correct = {"p": [1.0, 0.0, 1.0, 1.0], "q": [0.0, 0.0, 0.0, 1.0]}
    rows = [(problem, value) for problem, values in correct.items() for value in values]
    verl_metrics = process_validation_metrics(
        ["s"] * 8, [problem for problem, _ in rows], {"acc": [value for _, value in rows]}
    )
    answers = pd.DataFrame(
        {
            "mode": "samples",
            "benchmark": "s",
            "problem": [0] * 4 + [1] * 4,
            "correct": [value == 1.0 for _, value in rows],
        }
    )
    problems = pd.DataFrame({"benchmark": "s", "problem": [0, 1]})
    ours = evaluation.summarize(answers, problems, {"samples": 4})
    assert ours["evaluation/s/avg@4"] == pytest.approx(verl_metrics["s"]["acc"]["mean@4"])


def test_a_model_that_is_not_there_is_told_before_anything_starts(tmp_path, benchmarks, recipes):
    fake = FakeVerl({})
    with pytest.raises(FileNotFoundError, match="there is no model"):
        evaluate(
            tmp_path / "absent", Evaluation(benchmarks), tmp_path / "out", recipe="toy", recipes=recipes, train=fake
        )
    assert fake.overrides == []
    evaluate(
        Path("Qwen/Qwen2.5-0.5B"), Evaluation(benchmarks), tmp_path / "out", recipe="toy", recipes=recipes, train=fake
    )
    assert "actor_rollout_ref.model.path=Qwen/Qwen2.5-0.5B" in fake.overrides[0]


def test_an_unknown_recipe_is_told_with_those_there_are(tmp_path, benchmarks, recipes):
    with pytest.raises(FileNotFoundError, match=r"no recipe to: did you mean toy"):
        evaluate(tmp_path / "model", Evaluation(benchmarks), tmp_path / "out", recipe="to", recipes=recipes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": -3}, "samples must be at least 0, got -3"),
        ({"greedy": False}, "nothing to evaluate"),
        ({"samples": 1, "temperature": 0.0}, "temperature must be above 0"),
        ({"samples": 1, "top_p": 1.5}, "top_p must be above 0 and at most 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Evaluation(["b/test.parquet"], **settings)


def test_a_limit_on_the_problems_acts(tmp_path, benchmarks, recipes):
    fake = FakeVerl({("1+1=?", 0): 1}, problems=2)
    options = {"recipe": "toy", "recipes": recipes, "train": fake, "overrides": ["data.val_max_samples=2"]}
    metrics = evaluate(tmp_path / "model", Evaluation(benchmarks), tmp_path / "out", **options)
    # verl takes the first problems of all files, unless it shuffles.
    assert "data.shuffle=false" in fake.overrides[0]
    assert metrics == {"evaluation/easy/greedy": 0.5}


def test_an_unfinished_evaluation_is_renamed_and_another_folder_is_not(tmp_path, benchmarks, recipes):
    options = {"recipe": "toy", "recipes": recipes, "train": FakeVerl({})}
    (tmp_path / "out" / "greedy").mkdir(parents=True)
    evaluate(tmp_path / "model", Evaluation(benchmarks), tmp_path / "out", **options)
    assert len(list(tmp_path.glob("out-*"))) == 1
    with pytest.raises(FileExistsError):
        evaluate(tmp_path / "model", Evaluation(benchmarks), tmp_path, **options)


def test_a_folder_that_is_no_model_is_refused_with_the_checkpoints_in_it(tmp_path, benchmarks, recipes):
    fake, folder = FakeVerl({}), tmp_path / "run"
    (folder / "checkpoints" / "global_step_8" / "actor").mkdir(parents=True)
    options = {"recipe": "toy", "recipes": recipes, "train": fake}
    with pytest.raises(FileNotFoundError, match=r"neither a model.*checkpoints: .*/checkpoints/global_step_8"):
        evaluate(folder, Evaluation(benchmarks), tmp_path / "out", **options)
    assert fake.overrides == []


def test_a_session_of_several_outputs_is_one_sample(tmp_path):
    """Sessions of 1, 3 and 2 outputs; verl gives all outputs of a session the score of the last one."""
    uids = {"p_0_0": 1.0, "p_1_0": 0.0, "p_1_1": 0.0, "p_1_2": 0.0, "q_0_0": 1.0, "q_0_1": 1.0}
    lines = [{"input": "i", "output": uid, "gts": "g", "score": score, "uid": uid} for uid, score in uids.items()]
    (tmp_path / "0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = evaluation.read_generations(tmp_path)
    assert answers[["group", "sample", "response", "correct"]].to_numpy().tolist() == [
        ["p", 0, "p_0_0", True],
        ["p", 1, "p_1_2", False],
        ["q", 0, "q_0_1", True],
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "-3"], "must be an integer of at least 0"),
        (["--samples", "2", "--temperature", "0"], "temperature must be above 0"),
        (["actor_rollout_ref.rollout.val_kwargs.n=4"], "an evaluation sets this itself"),
        (["--benchmarks", "absent.parquet"], "absent.parquet"),
        (["--benchmarks", __file__], f"{__file__} is not readable as parquet"),
        ([], "there is no folder ./model"),
    ],
)
def test_the_command_refuses_before_anything_is_loaded(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(launch, "train", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(SystemExit):
        command.main(["./model", "--recipe", "quickstart", "--output", str(tmp_path / "out"), *arguments])
    assert message in capsys.readouterr().err


def test_ctrl_c_ends_the_command_without_a_traceback(tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "evaluate", interrupt)
    assert command.main([str(tmp_path), "--recipe", "quickstart", "--output", str(tmp_path / "out")]) == 130
    assert "interrupted" in capsys.readouterr().err
