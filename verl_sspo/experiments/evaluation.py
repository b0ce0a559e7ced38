"""Evaluation of a model or a checkpoint on benchmark sets, by verl's own validation: main_ppo with trainer.val_only.

On vLLM where the recipe says so, on the embedded engine with hardware=cpu. One main_ppo run for the greedy answers and
one for the samples; verl dumps every answer with its score, and this module joins them with the benchmark's rows.

With the folder `evaluation`:
greedy/, samples/    the runs, see `verl_sspo.run.launch`; generations/ in each holds verl's dump
problems.parquet     one row an answer: mode, benchmark, problem, sample, score, correct, prompt, ground_truth, response
metrics.json         {"evaluation/<benchmark>/<measure>": value}, measures: greedy, avg@<n>, pass@<k>
"""

import json
import math
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import MISSING, DictConfig
from rich.console import Console

from verl_sspo.run import launch
from verl_sspo.run.compose import compose_config
from verl_sspo.run.overrides import hydra_value

PROBLEMS = "problems.parquet"
METRICS = "metrics.json"

# `launch.train`, or what tests put in its place.
Trainer = Callable[..., Path]


@dataclass
class Evaluation:
    """What is evaluated.

    Args:
        benchmarks: parquet files in verl's schema, `<benchmark>/test.parquet`.
        greedy: one greedy answer a problem.
        samples: sampled answers a problem, for avg@k and pass@k; 0 for none.
        temperature, top_p: of these samples.
    """

    benchmarks: list[str] = MISSING
    greedy: bool = True
    samples: int = 0
    temperature: float = 1.0
    top_p: float = 1.0

    def modes(self) -> dict[str, list[str]]:
        """Overrides of each run."""
        key = "actor_rollout_ref.rollout.val_kwargs"
        modes = {}
        if self.greedy:
            modes["greedy"] = [f"{key}.do_sample=false", f"{key}.n=1", f"{key}.temperature=0"]
        if self.samples:
            sampling = [f"{key}.n={self.samples}", f"{key}.temperature={self.temperature}", f"{key}.top_p={self.top_p}"]
            modes["samples"] = [f"{key}.do_sample=true", *sampling, f"{key}.top_k=-1"]
        return modes


def prepare_task(config: DictConfig, console: Console | None = None, benchmarks: Collection[str] = ()) -> None:
    """Makes the quickstart's task if the configuration has one, and sees that all data files are there.

    Raises:
        FileNotFoundError: data files are missing; the message says which.
    """
    if "task" in config:
        from verl_sspo.quickstart.model import prepare_arithmetic

        task = config.task
        prepare_arithmetic(Path(task.folder).parent, task.digits, task.seed, heads=task.heads, console=console)
    files = list(benchmarks)
    for named in (config.data.train_files, config.data.val_files):
        files += [named] if isinstance(named, str) else list(named)
    local = {file for file in files if "://" not in file}
    if missing := sorted(file for file in local if not Path(file).expanduser().exists()):
        raise FileNotFoundError(
            f"no data at {', '.join(missing)}: `verl-sspo prepare-data TASK` makes it; the head of the recipe "
            "names the tasks"
        )


def evaluate(
    model: Path,
    evaluation: Evaluation,
    output: Path,
    *,
    recipe: str,
    overrides: Sequence[str] = (),
    recipes: Path,
    train: Trainer = launch.train,
    console: Console | None = None,
) -> dict[str, float]:
    """Evaluates a model with a recipe's engine, prompts, lengths and judges.

    Args:
        model: a Hugging Face folder or name, or a checkpoint of verl (`global_step_<n>`), which is loaded on as many
            ranks as it was saved from.
        evaluation: benchmarks and sampling.
        output: its folder, see the module; may not exist.
        recipe: recipe of `recipes`.
        overrides: Hydra overrides, those of the training for a checkpoint of verl.
        recipes: Hydra tree of the recipes.
        train: `verl_sspo.run.launch.train`.
        console: where the progress goes.

    Returns:
        What metrics.json holds.

    Raises:
        ValueError: neither greedy answers nor samples are asked for, two benchmarks share a name, or an answer belongs
            to no problem of the benchmarks.
        FileExistsError: `output` exists.
        FileNotFoundError: the model, the recipe or benchmarks are missing.
        launch.TrainingFailedError: main_ppo failed.
    """
    modes = evaluation.modes()
    if not modes:
        raise ValueError("nothing to evaluate: ask for greedy answers, samples, or both")
    if output.exists():
        raise FileExistsError(f"{output} exists: move it away or choose another folder")
    # In place of the recipe's own validation data, which need not be there.
    benchmarks = [*overrides, f"data.val_files={hydra_value(list(evaluation.benchmarks))}"]
    prepare_task(compose_config(recipe, benchmarks, recipes), console)
    problems = read_benchmarks(evaluation.benchmarks)
    common = [
        *benchmarks,
        "trainer.val_only=true",
        "trainer.val_before_train=true",
        "data.val_max_samples=-1",
        *_model_overrides(model),
    ]
    answers = []
    for mode, settings in modes.items():
        dump = output / mode / "generations"
        train(
            [*common, *settings, f"trainer.validation_data_dir={hydra_value(dump.resolve())}"],
            output / mode,
            config_dir=recipes,
            config_name=recipe,
            console=console,
        )
        answers.append(join(problems, read_generations(dump)).assign(mode=mode))
    table = pd.concat(answers, ignore_index=True)
    table.to_parquet(output / PROBLEMS, index=False)
    asked = {"greedy": 1, "samples": evaluation.samples}
    metrics = summarize(table, problems, asked)
    (output / METRICS).write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def _model_overrides(model: Path) -> list[str]:
    if not model.name.startswith("global_step_"):
        # A name on Hugging Face is a word, or two with a slash between them.
        if not model.exists() and (model.is_absolute() or len(model.parts) > 2):
            raise FileNotFoundError(f"there is no model {model}")
        return [f"actor_rollout_ref.model.path={hydra_value(model)}", "trainer.resume_mode=disable"]
    if not (model / "actor").is_dir():
        raise FileNotFoundError(f"{model} is no checkpoint of verl: it has no folder `actor`")
    return [
        "trainer.resume_mode=resume_path",
        f"trainer.resume_from_path={hydra_value(model.resolve())}",
        # The weights alone.
        "actor_rollout_ref.actor.checkpoint.load_contents=[model]",
    ]


def read_benchmarks(files: Sequence[str]) -> pd.DataFrame:
    """The problems of benchmark files: benchmark (the file's folder), problem (its row), question, ground_truth.

    Raises:
        ValueError: two files lie in folders of the same name.
    """
    names = [Path(file).parent.name for file in files]
    if len(set(names)) != len(names):
        raise ValueError(f"benchmarks are named by their folders, and these are not different: {', '.join(files)}")
    tables = []
    for name, file in zip(names, files, strict=True):
        rows = pd.read_parquet(file)
        tables.append(
            pd.DataFrame(
                {
                    "benchmark": name,
                    "problem": range(len(rows)),
                    "question": [messages[-1]["content"] for messages in rows["prompt"]],
                    "ground_truth": [_text(each["ground_truth"]) for each in rows["reward_model"]],
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def read_generations(folder: Path) -> pd.DataFrame:
    """verl's dump of a validation: group (the prompt's uid), sample, prompt, ground_truth, response, score, correct."""
    (file,) = folder.glob("*.jsonl")
    with file.open(encoding="utf-8") as lines:  # str.splitlines would also cut at U+2028 and the like
        entries = [json.loads(line) for line in lines]
    rows = []
    for entry in entries:
        # <uid>_<session>_<output of the session>
        group, sample, _ = entry["uid"].rsplit("_", 2)
        # Rewards that know no accuracy give a score alone.
        accuracy = entry.get("acc")
        rows.append(
            {
                "group": group,
                "sample": int(sample),
                "prompt": entry["input"],
                "ground_truth": _text(entry["gts"]),
                "response": entry["output"],
                "score": float(entry["score"]),
                "correct": float(entry["score"] if accuracy is None else accuracy) >= 1.0,
            }
        )
    return pd.DataFrame(rows)


def _text(ground_truth: Any) -> str:
    # pandas reads a list as an array, verl's dump holds the list.
    listed = ground_truth.tolist() if isinstance(ground_truth, np.ndarray) else ground_truth
    return listed if isinstance(listed, str) else json.dumps(listed, default=str)


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def join(problems: pd.DataFrame, generations: pd.DataFrame) -> pd.DataFrame:
    """Finds the problem of every answer: verl's dump has the prompt's text, but neither data set nor row.

    A prompt belongs to the problem with the same ground truth whose question it contains; of several, the longest.
    Problems with equal texts share their answers out, prompt by prompt. Prompts have been through the tokenizer, which
    may normalise them (NFC), and through the chat template, which may strip them.

    Raises:
        ValueError: a prompt contains no question of the benchmarks.
    """
    by_truth: dict[str, list[Any]] = defaultdict(list)
    for row in problems.itertuples():
        by_truth[row.ground_truth].append(row._replace(question=_normal(row.question)))
    places: dict[str, tuple[str, int]] = {}
    taken: set[tuple[str, int]] = set()
    for group, answers in generations.groupby("group", sort=False):
        prompt = _normal(answers["prompt"].iloc[0])
        candidates = [row for row in by_truth[answers["ground_truth"].iloc[0]] if row.question in prompt]
        if not candidates:
            raise ValueError(f"an answer belongs to no problem of the benchmarks; its prompt begins {prompt[:200]!r}")
        longest = max(len(row.question) for row in candidates)
        equals = [(row.benchmark, row.problem) for row in candidates if len(row.question) == longest]
        place = next((each for each in equals if each not in taken), equals[0])
        taken.add(place)
        places[str(group)] = place
    found = [places[group] for group in generations["group"]]
    joined = generations.drop(columns="group").assign(
        benchmark=[benchmark for benchmark, _ in found], problem=[problem for _, problem in found]
    )
    return joined.sort_values(["benchmark", "problem", "sample"], ignore_index=True)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n answers, drawn without replacement, hold a right one, c of them being right.

    The unbiased estimator of pass@k of arXiv:2107.03374 (Codex), equation 1.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def _ks(samples: int) -> Iterator[int]:
    k = 1
    while k < samples:
        yield k
        k *= 2
    yield samples


def summarize(answers: pd.DataFrame, problems: pd.DataFrame, asked: dict[str, int]) -> dict[str, float]:
    """Measures of each benchmark over all of its problems; an answer that verl did not return counts as wrong.

    Args:
        answers: mode, benchmark, problem, correct.
        problems: benchmark, problem.
        asked: answers a problem of each mode.

    Returns:
        {"evaluation/<benchmark>/<measure>": value}: greedy; avg@<n>; pass@<k> for k = 1, 2, 4, ... n; and
        missing@<mode>, the answers that did not come back, where there are any.
    """
    metrics: dict[str, float] = {}
    for benchmark, rows in problems.groupby("benchmark", sort=False):
        for mode, n in asked.items():
            chosen = answers[(answers["mode"] == mode) & (answers["benchmark"] == benchmark)]
            if not n or not (answers["mode"] == mode).any():
                continue
            right = chosen.groupby("problem")["correct"].sum().reindex(rows["problem"], fill_value=0).astype(int)
            prefix = f"evaluation/{benchmark}"
            if mode == "greedy":
                metrics[f"{prefix}/greedy"] = float(right.mean())
            else:
                metrics[f"{prefix}/avg@{n}"] = float(right.mean() / n)
                for k in _ks(n):
                    metrics[f"{prefix}/pass@{k}"] = float(sum(pass_at_k(n, c, k) for c in right) / len(right))
            if missing := n * len(rows) - len(chosen):
                metrics[f"{prefix}/missing@{mode}"] = missing
    return metrics
