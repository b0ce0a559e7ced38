"""Suites: the runs that the YAML files describe, and the code that runs them, with a small process in place of verl."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import verl  # noqa: F401  loads the plugin
from fake_trainer import fake_train
from filelock import FileLock
from omegaconf import OmegaConf
from rich.console import Console
from verl.utils.config import omega_conf_to_dataclass

from verl_sspo import compose
from verl_sspo.compose import compose_config, hydra_overrides
from verl_sspo.data import word_problems
from verl_sspo.data.tasks import TASKS
from verl_sspo.experiments import cell as cells
from verl_sspo.experiments import reproduce, runner
from verl_sspo.experiments.evaluation import Evaluation
from verl_sspo.experiments.runner import run
from verl_sspo.experiments.suite import Cell, expand, load_suite
from verl_sspo.run import launch

RECIPES = Path(__file__).parents[2] / "recipes"
SUITES = sorted((RECIPES / "suites").glob("*.yaml"))

MINIMAL = """
title: t
shows: s
shows_not: n
recipe: toy
seeds: [0, 1]
seed_keys: [seed]
baseline: a
algorithms:
  a: {title: A, overrides: {lr: 1.0}}
  b: {title: B, overrides: {lr: 2.0}}
measures:
  reward: {metrics: [critic/score/mean]}
"""


@pytest.fixture
def recipes(tmp_path):
    folder = tmp_path / "recipes"
    folder.mkdir()
    (tmp_path / "data.parquet").touch()
    (folder / "toy.yaml").write_text(
        f"lr: 0.0\nseed: 0\nbehaviour: finish\ndata:\n  train_files: {tmp_path}/data.parquet\n"
        f"  val_files: {tmp_path}/data.parquet\n"
    )
    return folder


def toy(algorithm="a", seed=0, behaviour="finish", **overrides):
    settings = hydra_overrides({"behaviour": behaviour, "seed": seed}, overrides)
    return Cell("toy", "default", algorithm, seed, "toy", tuple(settings))


def run_all(toys, root, recipes, **options):
    console = Console(file=(root.parent / "console.txt").open("a"), width=200)
    return run(toys, root, recipes, console=console, train=fake_train, **options)


@functools.cache
def _composed(recipe, *groups):
    return compose_config(recipe, groups, RECIPES)


def _compose(recipe, overrides):
    """Hydra composes only the choices of groups. The rest is merged, which is faster."""
    groups = [each for each in overrides if each.startswith(("algo=", "hardware=", "+mode=", "+staleness="))]
    values = OmegaConf.from_dotlist([each for each in overrides if each not in groups])
    # This still rejects unknown keys.
    return OmegaConf.merge(_composed(recipe, *groups), values)


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_every_cell_of_a_suite_is_a_configuration_that_verl_accepts(path):
    suite = load_suite(path)
    every = expand(suite, path.stem)
    assert len(every) == len(suite.seeds) * len(suite.variants) * len(suite.algorithms)
    assert len({cell.name for cell in every}) == len({cell.overrides for cell in every}) == len(every)
    for cell in every[: len(every) // len(suite.seeds)]:
        config = _compose(cell.recipe, cell.overrides)
        actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
        actor.validate(config.trainer.n_gpus_per_node, config.data.train_batch_size, config.actor_rollout_ref.model)
        updates = config.data.train_batch_size // actor.ppo_mini_batch_size * actor.ppo_epochs
        stale = config.algorithm.rollout_correction.bypass_mode
        assert updates > 1 or stale, "on policy all losses have the same gradient"


@pytest.mark.parametrize(
    "path",
    [RECIPES / f"{name}.yaml" for name in ("gsm8k", "math", "gsm8k_deepmath", "code", "word_problems")]
    + [RECIPES / f"suites/{name}.yaml" for name in ("math", "code", "table_sapo_gates", "smollm2")],
    ids=lambda path: path.stem,
)
def test_the_commands_at_its_head_make_the_data_of_a_recipe_or_suite(path):
    benchmarks = []
    if path in SUITES:
        suite = load_suite(path)
        config = _compose(suite.recipe, expand(suite, path.stem)[0].overrides)
        benchmarks = [] if suite.evaluation is None else list(suite.evaluation.benchmarks)
    else:
        config = _composed(path.stem)
    commands = re.findall(r"^#   (.*)$", path.read_text(), re.M)
    # The other commands, such as main_ppo, only need to parse: the PATH is empty.
    shell = ["PATH=", 'verl-sspo() { [ "$1" != prepare-data ] || echo "${@:2}"; }', *commands]
    lines = subprocess.run(["bash", "-c", "\n".join(shell)], capture_output=True, text=True).stdout.splitlines()
    made = {}
    for line in lines:
        words = line.split()
        options = dict(zip(words[1::2], words[2::2], strict=False))
        made[options.get("--output", f"data/{words[0]}")] = options.get("--template", "boxed")
    train, val = config.data.train_files, config.data.val_files
    files = [file for each in (train, val) for file in ([each] if isinstance(each, str) else each)]
    needed = {str(Path(file).parent) for file in [*files, *benchmarks]}
    assert needed <= made.keys()
    assert all((template == "think") == folder.endswith("-think") for folder, template in made.items())


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_validation_metrics_are_those_that_verl_will_log(path):
    suite = load_suite(path)
    config = _compose(suite.recipe, expand(suite, path.stem)[0].overrides)
    sources = {task.data_source for task in TASKS.values()} | {"arithmetic"}
    sources |= {f"{word_problems.DATA_SOURCE}/{operation}" for operation in word_problems.OPERATIONS}
    for measure in suite.measures.values():
        for metric in measure.metrics:
            if match := re.fullmatch(r"val-core/(.+)/acc/mean@(\d+)", metric):
                assert match[1] in sources
                assert int(match[2]) == config.actor_rollout_ref.rollout.val_kwargs.n
            elif match := re.fullmatch(r"evaluation/(.+)/(greedy|avg@(\d+))", metric):
                assert match[1] in {Path(file).parent.name for file in suite.evaluation.benchmarks}
                assert suite.evaluation.greedy if match[2] == "greedy" else suite.evaluation.samples == int(match[3])
            else:
                plain = {"plain/abs_log_ratio"} if suite.trainer == "plain" else set()
                assert metric in {"critic/score/mean", "actor/entropy", "actor/pg_clipfrac"} | plain


def test_tiny_has_every_algorithm_of_the_recipes_at_16_updates_a_rollout():
    suite = load_suite(RECIPES / "suites" / "tiny.yaml")
    algorithms = {arm.overrides["algo"] for arm in suite.algorithms.values()}
    # The sequence gate came later and has its own suite.
    assert algorithms == {path.stem for path in (RECIPES / "algo").glob("*.yaml")} - {"sspo_sequence"}
    config = _compose("quickstart", expand(suite, "tiny")[0].overrides)
    responses = config.data.train_batch_size * config.actor_rollout_ref.rollout.n
    assert responses == 128
    assert config.actor_rollout_ref.actor.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n == 32
    assert responses // 32 * config.actor_rollout_ref.actor.ppo_epochs == 16


def test_all_algorithms_of_a_seed_come_before_the_next_seed(tmp_path):
    (tmp_path / "toy.yaml").write_text(MINIMAL)
    suite = load_suite(tmp_path / "toy.yaml")
    names = [cell.name for cell in expand(suite, "toy")]
    assert names == ["default/a/seed0", "default/b/seed0", "default/a/seed1", "default/b/seed1"]
    assert [cell.overrides for cell in expand(suite, "toy", algorithms=["b"], seeds=[7])] == [("lr=2.0", "seed=7")]
    with pytest.raises(ValueError, match="no algorithm c: there are a, b"):
        expand(suite, "toy", algorithms=["c"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("baseline: a", "baseline: c", "baseline='c' is not an algorithm"),
        ("seeds: [0, 1]", "seeds: [0, 0]", "different numbers"),
        ("title: t\n", "", "title must be set"),
        ("title: t\n", "title: t\ntypo: 1\n", "typo"),
        ("  a: {", "  a/b: {", "names a folder"),
        ("overrides: {lr: 1.0}}", "override: {lr: 1.0}}", "override"),
        ("metrics: [critic/score/mean]", "metrics: [x], summary: best", "last or mean"),
        ("{lr: 1.0}", "{'a b': 1.0}", "Hydra"),
        ("seeds: [0, 1]", "seeds: [0, [1]]", "different numbers of at least 0"),
        ("seeds: [0, 1]", "seeds: [0, -1]", "different numbers of at least 0"),
        ("metrics: [critic/score/mean]", "metrics: [[x]]", "metrics must be names"),
        (MINIMAL, "0", "not a YAML file of a suite"),
        (MINIMAL, MINIMAL + "evaluation: {benchmarks: [b], samples: -3}\n", "samples must be at least 0"),
        (MINIMAL, "- title", "a suite has keys"),
        (MINIMAL, "\x1f", "not a YAML file of a suite"),
    ],
)
def test_a_suite_that_does_not_fit_together_is_refused(tmp_path, old, new, message):
    assert old in MINIMAL
    (tmp_path / "bad.yaml").write_text(MINIMAL.replace(old, new))
    with pytest.raises(ValueError, match=message):
        load_suite(tmp_path / "bad.yaml")


def test_published_numbers_need_a_status_and_rows_and_columns_that_exist(tmp_path):
    def load(values, status="published"):
        text = f"\npublished:\n  - source: s\n    status: {status}\n    values: {values}\n"
        (tmp_path / "p.yaml").write_text(MINIMAL + text)
        return load_suite(tmp_path / "p.yaml")

    assert load("{untrained: {reward: 1}, a: {reward: null}}").published[0].values["untrained"]["reward"] == 1.0
    with pytest.raises(ValueError, match="'c' is neither"):
        load("{c: {reward: 1}}")
    with pytest.raises(ValueError, match="'rewrd' is not a measure"):
        load("{a: {rewrd: 1}}")
    with pytest.raises(ValueError, match="published or restated"):
        load("{a: {reward: 1}}", "guessed")


def test_nested_settings_become_hydra_overrides_and_later_ones_win(tmp_path):
    settings = [
        {"a": {"b": 1, "c": [1, "x y"]}, "d": None},
        {"a.b": 2.5, "e": True, "f": r"it's \d \\'\\", "g": "${a.b}"},
    ]
    overrides = hydra_overrides(*settings)
    assert overrides[0] == "a.b=2.5"
    (tmp_path / "toy.yaml").write_text("a: {b: 0, c: []}\nd: 1\ne: false\nf: ''\ng: 0\n")
    config = compose_config("toy", overrides, tmp_path)
    expected = {"a": {"b": 2.5, "c": [1, "x y"]}, "d": None, "e": True, "f": r"it's \d \\'\\", "g": 2.5}
    assert OmegaConf.to_container(config, resolve=True) == expected


def test_cells_run_are_skipped_when_finished_and_one_failure_stops_no_other(tmp_path, recipes):
    toys = [toy("a"), toy("b", behaviour="fail"), toy("c"), toy("d", nonsense=1)]
    root = tmp_path / "runs"
    outcome = run_all(toys, root, recipes, jobs=2)
    assert sorted(outcome.finished) == ["default/a/seed0", "default/c/seed0"]
    assert set(outcome.failed) == {"default/b/seed0", "default/d/seed0"}
    assert "nonsense" in outcome.failed["default/d/seed0"]
    failure = json.loads((root / "default/b/seed0" / cells.FAILURE).read_text())
    assert "the worker died" in failure["excerpt"]
    assert cells.state(root / "default/b/seed0") == "failed"
    assert {path.name for path in (root / "default/a/seed0").iterdir()} >= {
        "cell.json",
        "config.yaml",
        "attempt-1",
        "result.json",
    }
    plan = cells.plan_of(root / "default/a/seed0")
    assert plan["seed"] == 0
    assert plan["versions"][0]["torch"]
    assert re.search(r"\[4/4\] default/\w/seed0", (tmp_path / "console.txt").read_text())

    again = run_all(toys, root, recipes)
    assert again.finished == []
    assert len(again.skipped) == 2
    assert len(cells.attempts(root / "default/a/seed0")) == 1


def test_without_checkpoints_a_broken_cell_starts_anew_and_keeps_the_old_attempt(tmp_path, recipes):
    root = tmp_path / "runs"
    run_all([toy(behaviour="fail")], root, recipes)
    folder = root / toy().name
    assert len((folder / "attempt-1" / launch.METRICS).read_text().splitlines()) == 3
    run_all([toy(behaviour="fail")], root, recipes)
    assert [path.name for path in cells.attempts(folder)] == ["attempt-1"]
    kept = [path for path in folder.glob("attempt-1-*") if path.is_dir()]
    assert len(kept) == 1
    assert len((kept[0] / launch.METRICS).read_text().splitlines()) == 3


def test_with_a_checkpoint_a_broken_cell_resumes(tmp_path, recipes):
    root = tmp_path / "runs"
    broken = toy(behaviour="checkpoint-fail")
    assert run_all([broken], root, recipes).failed
    assert run_all([broken], root, recipes).finished == [broken.name]
    folder = root / broken.name
    assert [path.name for path in cells.attempts(folder)] == ["attempt-1", "attempt-2"]
    resumed = [json.loads(line)["step"] for line in (folder / "attempt-2" / launch.METRICS).open()]
    assert resumed == [3, 4]
    assert cells.state(folder) == "finished"


def test_a_folder_with_other_settings_is_not_touched(tmp_path, recipes):
    root = tmp_path / "runs"
    run_all([toy(behaviour="fail")], root, recipes)
    outcome = run_all([toy(behaviour="fail", lr=3.0)], root, recipes)
    assert "holds a run with other settings (lr: 0.0 there, 3.0 now)" in outcome.failed[toy().name]
    assert (root / toy().name / "attempt-1").exists()


def test_reproduce_mixes_no_settings(tmp_path, recipes, monkeypatch, capsys):
    """The suite was edited after some cells had finished: nothing starts and nothing is written."""
    suite, root = tmp_path / "toy.yaml", tmp_path / "runs"
    monkeypatch.setattr(compose, "RECIPES", recipes)
    monkeypatch.setattr(runner, "run", lambda *args, **options: run(*args, **options | {"train": fake_train}))
    monkeypatch.setattr(sys, "argv", ["reproduce", str(suite), "--output", str(root)])
    monkeypatch.chdir(tmp_path)
    text = MINIMAL + "overrides: {behaviour: finish}\n"
    suite.write_text(text)
    assert reproduce.main() == 0
    assert len(list(root.glob("*/*/*/result.json"))) == 4
    assert reproduce.main() == 0
    suite.write_text(text.replace("2.0", "3.0"))
    with pytest.raises(SystemExit):
        reproduce.main()
    assert "lr: 2.0 there, 3.0 now" in capsys.readouterr().err
    assert (root / "suite.yaml").read_text() == text


def test_a_run_that_resumes_with_other_versions_names_both(tmp_path, recipes):
    root, broken = tmp_path / "runs", toy(behaviour="checkpoint-fail")
    assert run_all([broken], root, recipes).failed
    folder = root / broken.name
    plan = cells.plan_of(folder)
    older = [plan["versions"][0] | {"commit": "older"}]
    (folder / cells.PLAN).write_text(json.dumps(plan | {"versions": older}))
    assert run_all([broken], root, recipes).finished == [broken.name]
    assert cells.plan_of(folder)["versions"] == [*older, *plan["versions"]]


def test_versions_of_earlier_releases_are_read(tmp_path):
    (tmp_path / cells.PLAN).write_text('{"ran_with": {"torch": "1"}, "went_on_with": [{"torch": "2"}]}')
    assert cells.plan_of(tmp_path)["versions"] == [{"torch": "1"}, {"torch": "2"}]


def test_two_runs_never_start_in_one_folder(tmp_path, recipes):
    root = tmp_path / "runs"
    folder = root / toy().name
    folder.mkdir(parents=True)
    with FileLock(folder / cells.LOCK):
        assert cells.state(folder) == "running"
        outcome = run_all([toy(), toy("b")], root, recipes)
        assert outcome.busy == [toy().name]
        assert outcome.finished == [toy("b").name]
    assert cells.attempts(folder) == []

    # A main_ppo that outlived its launcher holds no lock, but still writes.
    orphan = subprocess.Popen([sys.executable, "-c", "input()", f"hydra.run.dir='{folder}/attempt-1/hydra'"], stdin=-1)
    try:
        assert run_all([toy()], root, recipes).busy == [toy().name]
    finally:
        orphan.kill()
        orphan.communicate()
    assert run_all([toy()], root, recipes).finished == [toy().name]


def test_missing_data_is_told_before_anything_starts(tmp_path, recipes):
    (tmp_path / "data.parquet").unlink()
    outcome = run_all([toy()], tmp_path / "runs", recipes)
    assert "no data at" in outcome.failed[toy().name]
    assert "prepare-data" in outcome.failed[toy().name]
    assert cells.attempts(tmp_path / "runs" / toy().name) == []


@pytest.mark.parametrize("arguments", [["--seeds", "-1"], ["--jobs", "0"], ["--seeds", "x"]])
def test_numbers_out_of_range_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        reproduce.main(["tiny", *arguments])
    assert "must be an integer of at least" in capsys.readouterr().err


INTERRUPTED = """
import sys
from pathlib import Path
from fake_trainer import fake_train
from verl_sspo.experiments.suite import Cell
from verl_sspo.experiments.runner import run
if __name__ == "__main__":
    cell = Cell("toy", "default", "a", 0, "toy", ("behaviour=hang", "seed=0"))
    run([cell], Path(sys.argv[1]), Path(sys.argv[2]), train=fake_train)
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_without_the_runner_the_running_cells_end_their_processes(tmp_path, recipes, signum):
    root = tmp_path / "runs"
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, tmp_path / "interrupted.py", root, recipes]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    pid_file = root / toy().name / "attempt-1" / "pid"
    wait_for(lambda: pid_file.exists() and pid_file.read_text())
    process.send_signal(signum)
    assert process.wait(120) != 0
    wait_for(lambda: not psutil.pid_exists(int(pid_file.read_text())))
    wait_for(lambda: cells.state(root / toy().name) == "interrupted")


def wait_for(condition, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_another_trainer_is_another_setting(tmp_path, recipes):
    root, folder = tmp_path / "runs", tmp_path / "runs" / toy().name
    run_all([toy(behaviour="fail")], root, recipes)
    with pytest.raises(ValueError, match="trainer: verl there, plain now"):
        cells.check_settings(replace(toy(behaviour="fail"), trainer="plain"), folder, recipes)


def test_other_measures_of_an_evaluation_are_other_settings(tmp_path, recipes):
    root, folder = tmp_path / "runs", tmp_path / "runs" / toy().name
    run_all([toy(behaviour="fail")], root, recipes)
    evaluated = replace(toy(behaviour="fail"), evaluation=Evaluation(["b/test.parquet"], samples=4))
    with pytest.raises(ValueError, match=r"other settings \(evaluation: None there, {'benchmarks'"):
        cells.check_settings(evaluated, folder, recipes)
