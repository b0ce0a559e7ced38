"""Evaluates a model or a checkpoint on benchmark sets with verl's own validation: main_ppo with trainer.val_only.

The greedy answers are one main_ppo run, the samples another. verl dumps every answer with its score; this module joins
them with the benchmark's rows.

Files in the folder `evaluation`:
greedy/, samples/    the runs, see `verl_sspo.run.launch`; generations/ in each holds verl's dump
problems.parquet     a row per answer: mode, benchmark, problem, sample, score, correct, prompt, ground_truth, response
metrics.json         {"evaluation/<benchmark>/<measure>": value}, measures: greedy, avg@<n>, pass@<k>
"""

import json
import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import MISSING
from pyarrow import ArrowInvalid
from rich.console import Console

from verl_sspo.compose import compose_config, hydra_overrides, hydra_value
from verl_sspo.run import launch
from verl_sspo.run.folder import move_aside
from verl_sspo.run.task import prepare_task

PROBLEMS = "problems.parquet"
METRICS = "metrics.json"

# `launch.train`, `plain.train`, or a replacement in tests.
Trainer = Callable[..., Path]


@dataclass
class Evaluation:
    """What to evaluate. Raises ValueError if a value is out of range."""

    benchmarks: list[str] = MISSING  # parquet files in verl's schema, `<benchmark>/test.parquet`
    greedy: bool = True  # one greedy answer per problem
    samples: int = 0  # sampled answers per problem, for avg@k and pass@k
    temperature: float = 1.0  # of the samples
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.samples < 0:
            raise ValueError(f"samples must be at least 0, got {self.samples}")
        if not (self.greedy or self.samples):
            raise ValueError("nothing to evaluate: ask for greedy answers, samples, or both")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0, got {self.temperature}: greedy answers are separate")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    def modes(self) -> dict[str, dict[str, Any]]:
        """The sampling parameters of each run, as verl's `val_kwargs`."""
        sampling = {"do_sample": True, "n": self.samples, "temperature": self.temperature, "top_p": self.top_p}
        modes = {"greedy": {"do_sample": False, "n": 1, "temperature": 0}} if self.greedy else {}
        return modes | ({"samples": sampling | {"top_k": -1}} if self.samples else {})


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
    """Evaluates a model with a recipe's engine, prompts, lengths and graders.

    Args:
        model: a Hugging Face folder or name, or a checkpoint of verl (`global_step_<n>`), which is loaded on as many
            ranks as it was saved from.
        evaluation: benchmarks and sampling.
        output: output folder, see the module. An unfinished evaluation there is renamed.
        recipe, recipes: name and folder of the recipe.
        overrides: Hydra overrides; for a checkpoint of verl, those of its training. `data.val_max_samples=N` evaluates
            only the first N problems.
        train, console: function that runs main_ppo, and where to show progress.

    Returns:
        The content of metrics.json.

    Raises:
        ValueError: two benchmarks share a name, a file is not in verl's schema, or an answer belongs to no problem.
        FileExistsError: `output` holds something other than an unfinished evaluation.
        FileNotFoundError: the model, the recipe or benchmarks are missing.
        launch.TrainingFailedError: main_ppo failed.
    """
    modes = evaluation.modes()
    if output.exists() and not {path.name for path in output.iterdir()} <= {*modes, PROBLEMS}:
        raise FileExistsError(f"{output} exists: move it away or choose another folder")
    common = [
        "data.val_max_samples=-1",  # all problems, unless the overrides limit them
        *overrides,
        f"data.val_files={hydra_value(list(evaluation.benchmarks))}",
        "data.shuffle=false",  # verl shuffles before it takes the first val_max_samples
    ]
    config = compose_config(recipe, common, recipes)
    common += ["trainer.val_only=true", "trainer.val_before_train=true", *model_overrides(model)]
    prepare_task(config, console)
    problems, limit = read_benchmarks(evaluation.benchmarks), config.data.val_max_samples
    problems = problems.head(limit) if limit > 0 else problems
    move_aside(output)
    answers = []
    for mode, sampling in modes.items():
        dump = (output / mode / "generations").resolve()
        settings = hydra_overrides(
            {"actor_rollout_ref.rollout.val_kwargs": sampling, "trainer.validation_data_dir": dump}
        )
        train([*common, *settings], output / mode, config_dir=recipes, config_name=recipe, console=console)
        answers.append(join(problems, read_generations(dump)).assign(mode=mode))
    table = pd.concat(answers, ignore_index=True)
    table.to_parquet(output / PROBLEMS, index=False)
    metrics = summarize(table, problems, {mode: sampling["n"] for mode, sampling in modes.items()})
    (output / METRICS).write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def model_overrides(model: Path) -> list[str]:
    """Overrides that make verl load a model or a checkpoint.

    Raises:
        FileNotFoundError: `model` is neither; the message names checkpoints below it.
    """
    if (model / "actor").is_dir():
        settings = {"resume_mode": "resume_path", "resume_from_path": model.resolve()}
        # The weights without the optimizer.
        return hydra_overrides({"trainer": settings, "actor_rollout_ref.actor.checkpoint.load_contents": ["model"]})
    # A name on Hugging Face is NAME or OWNER/NAME.
    if not model.exists() and (model.is_absolute() or len(model.parts) > 2):
        raise FileNotFoundError(f"there is no model {model}")
    if model.exists() and not ((model / "config.json").exists() and any(model.glob("tokenizer*"))):
        below = ", ".join(sorted(str(path.parent) for path in model.rglob("global_step_*/actor")))
        raise FileNotFoundError(
            f"{model} is neither a model (config.json, tokenizer) nor a checkpoint of verl (folder `actor`)"
            + (f"; there are checkpoints: {below}" if below else "")
        )
    return hydra_overrides({"actor_rollout_ref.model.path": model, "trainer.resume_mode": "disable"})


def read_benchmarks(files: Sequence[str]) -> pd.DataFrame:
    """The problems of benchmark files: benchmark (the file's folder), problem (its row), question, ground_truth.

    Raises:
        ValueError: two files lie in folders of the same name, or one is not in verl's schema.
    """
    names = [Path(file).resolve().parent.name for file in files]
    if len(set(names)) != len(names):
        raise ValueError(f"benchmarks are named by their folders, and these names repeat: {', '.join(files)}")
    tables = []
    for name, file in zip(names, files, strict=True):
        try:
            rows = pd.read_parquet(file)
        except ArrowInvalid as error:
            raise ValueError(f"{file} is not readable as parquet") from error
        if missing := {"prompt", "reward_model"} - set(rows):
            raise ValueError(f"{file} has no {', '.join(sorted(missing))}: its columns are {', '.join(rows)}")
        questions = [messages[-1]["content"] for messages in rows["prompt"]]
        truths = [_text(each["ground_truth"]) for each in rows["reward_model"]]
        table = {"benchmark": name, "problem": range(len(rows)), "question": questions, "ground_truth": truths}
        tables.append(pd.DataFrame(table))
    return pd.concat(tables, ignore_index=True)


def read_generations(folder: Path) -> pd.DataFrame:
    """verl's dump of a validation: group (the prompt's uid), sample, prompt, ground_truth, response, score, correct.

    A sample is a session. If a session has several outputs, as in agent loops, only the last is kept.
    """
    (file,) = folder.glob("*.jsonl")
    with file.open(encoding="utf-8") as lines:  # str.splitlines would also cut at U+2028 and the like
        entries = pd.DataFrame([json.loads(line) for line in lines])
    # <uid>_<session>_<output of the session>
    entries[["group", "sample", "part"]] = entries["uid"].str.rsplit("_", n=2, expand=True)
    entries = entries.astype({"sample": int, "part": int, "score": float})
    entries = entries.sort_values("part").drop_duplicates(["group", "sample"], keep="last").sort_index()
    # Some rewards give a score but no accuracy.
    accuracy = entries.get("acc", entries["score"]).astype(float).fillna(entries["score"])
    names = {"input": "prompt", "gts": "ground_truth", "output": "response"}
    entries = entries.rename(columns=names).assign(correct=accuracy >= 1.0, ground_truth=entries["gts"].map(_text))
    return entries[["group", "sample", *names.values(), "score", "correct"]].reset_index(drop=True)


def _text(ground_truth: Any) -> str:
    # pandas reads a list as an array, verl's dump holds the list.
    listed = ground_truth.tolist() if isinstance(ground_truth, np.ndarray) else ground_truth
    return listed if isinstance(listed, str) else json.dumps(listed, default=str)


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def join(problems: pd.DataFrame, generations: pd.DataFrame) -> pd.DataFrame:
    """Finds the problem of every answer: verl's dump has the prompt's text, but neither data set nor row.

    A prompt belongs to the longest question in it that has the same ground truth. Problems with equal texts are used in
    order. Texts are compared in NFC and stripped, because tokenizers and chat templates change them so.

    Raises:
        ValueError: a prompt contains no question of the benchmarks.
    """
    unused = problems.assign(question=problems["question"].map(_normal))
    groups = generations.groupby("group", sort=False)[["prompt", "ground_truth"]].first()
    rows = {}
    for group, prompt, truth in groups.itertuples():
        text = _normal(prompt)
        candidates = unused[unused["ground_truth"] == truth]["question"]
        candidates = candidates[[question in text for question in candidates]]
        if candidates.empty:
            raise ValueError(f"an answer belongs to no problem of the benchmarks; its prompt begins {text[:200]!r}")
        rows[group] = candidates.str.len().idxmax()
        unused = unused.drop(rows[group])
    joined = generations.assign(row=generations["group"].map(rows)).drop(columns="group")
    joined = joined.merge(problems[["benchmark", "problem"]], left_on="row", right_index=True).drop(columns="row")
    return joined.sort_values(["benchmark", "problem", "sample"], ignore_index=True)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The probability that k of n answers, drawn without replacement, include a right one, if c of the n are right.

    The unbiased estimator of pass@k of arXiv:2107.03374 (Codex), equation 1; 0 <= c <= n, 1 <= k <= n.
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def summarize(answers: pd.DataFrame, problems: pd.DataFrame, asked: dict[str, int]) -> dict[str, float]:
    """Measures of each benchmark over all of its problems; an answer that verl did not return counts as wrong.

    Args:
        answers: mode, benchmark, problem, correct.
        problems: benchmark, problem.
        asked: answers per problem, for each mode that was run.

    Returns:
        {"evaluation/<benchmark>/<measure>": value}: greedy; avg@<n>; pass@<k> for k = 1, 2, 4, ... n; and
        missing@<mode>, the number of answers that did not come back, if any.
    """
    metrics: dict[str, float] = {}
    for benchmark, rows in problems.groupby("benchmark", sort=False):
        prefix = f"evaluation/{benchmark}"
        for mode, n in asked.items():
            chosen = answers[(answers["mode"] == mode) & (answers["benchmark"] == benchmark)]
            right = chosen.groupby("problem")["correct"].sum().reindex(rows["problem"], fill_value=0).astype(int)
            if mode == "greedy":
                metrics[f"{prefix}/greedy"] = float(right.mean())
            else:
                metrics[f"{prefix}/avg@{n}"] = float(right.mean() / n)
                for k in sorted({2**i for i in range(n.bit_length())} | {n}):
                    metrics[f"{prefix}/pass@{k}"] = float(np.mean([pass_at_k(n, c, k) for c in right]))
            if missing := n * len(rows) - len(chosen):
                metrics[f"{prefix}/missing@{mode}"] = missing
    return metrics
