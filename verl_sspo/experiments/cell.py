"""One run of a suite and its folder.

Example: the folder `runs/tiny/lr1e-4/sspo/seed0`
cell.json        what the suite asks for, and the versions of everything that ran
config.yaml      the resolved configuration, without the keys that name this folder
attempt-1/       a start of main_ppo: train.log, metrics.jsonl, hydra/ (see `run.launch`); attempt-2/ and so on
                 resume from the checkpoints of earlier attempts
checkpoints/     if the suite saves any
trained          exists if the training is finished
evaluation/      of the last checkpoint, if the suite asks for it
failure.json     why the last attempt failed
result.json      exists if the run is finished
reproduce.log    progress
"""

import json
import os
import platform
import subprocess
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig
from rich.console import Console

from verl_sspo.compose import compose_config, hydra_value
from verl_sspo.experiments.evaluation import METRICS, Trainer, evaluate
from verl_sspo.experiments.suite import Cell
from verl_sspo.run import checkpoints, launch
from verl_sspo.run.folder import attempts, move_aside, write_atomically
from verl_sspo.run.processes import running_in
from verl_sspo.run.settings import differences, resolved
from verl_sspo.run.task import prepare_task

PLAN = "cell.json"
CONFIG = "config.yaml"
TRAINED = "trained"
RESULT = "result.json"
FAILURE = "failure.json"
LOG = "reproduce.log"
LOCK = ".lock"
CHECKPOINTS = "checkpoints"
EVALUATION = "evaluation"


class CellRunningError(RuntimeError):
    """Another process runs this cell."""


def state(folder: Path) -> str:
    """The state of a cell's folder: "finished", "running", "failed", "interrupted" or "not started"."""
    if (folder / RESULT).exists():
        return "finished"
    if (folder / LOCK).exists():
        try:
            with FileLock(folder / LOCK, timeout=0):
                pass
        except Timeout:
            return "running"
    if (folder / FAILURE).exists():
        return "failed"
    return "interrupted" if attempts(folder) else "not started"


def check_settings(cell: Cell, folder: Path, recipes: Path) -> DictConfig:
    """The configuration of a cell.

    Raises:
        ValueError: the folder holds a run, finished or not, with other settings.
    """
    config = compose_config(cell.recipe, cell.overrides, recipes)
    there = folder / CONFIG
    different = differences(there.read_text(), resolved(config)) if there.exists() else []
    if (folder / PLAN).exists():
        before, now = plan_of(folder)["evaluation"], asdict(cell)["evaluation"]
        different += [f"evaluation: {before} there, {now} now"] if before != now else []
        trained_by = plan_of(folder)["trainer"]
        different += [f"trainer: {trained_by} there, {cell.trainer} now"] if trained_by != cell.trainer else []
    if different:
        raise ValueError(
            f"{folder} holds a run with other settings ({', '.join(different[:5])}): "
            "move it away or give --output another folder"
        )
    return config


def run_cell(cell: Cell, folder: Path, recipes: Path, train: Trainer = launch.train) -> None:
    """Runs a cell to its end: prepares its task, trains, evaluates. A finished cell is left unchanged.

    Training resumes from a checkpoint in the folder. Without one, earlier attempts are renamed and training starts from
    the beginning.

    Raises:
        CellRunningError: another process runs it.
        ValueError: the folder holds a run with other settings.
        FileNotFoundError: data files are missing.
        launch.TrainingFailedError: main_ppo failed.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # `state`, e.g. in a report, holds the lock for a moment.
        with FileLock(folder / LOCK, timeout=2):
            if (folder / RESULT).exists():
                return
            # A main_ppo whose launcher and guard were both killed keeps training, without the lock.
            if (pid := running_in(folder)) is not None:
                raise CellRunningError(f"process {pid} is still training in {folder}: end it first")
            with (folder / LOG).open("a", encoding="utf-8") as log:
                _run_locked(cell, folder, recipes, train, Console(file=log, width=120))
    except Timeout as error:
        raise CellRunningError(f"{folder} is being run by another process") from error


def _run_locked(cell: Cell, folder: Path, recipes: Path, train: Trainer, console: Console) -> None:
    started, saved = time.time(), folder / CHECKPOINTS
    config = check_settings(cell, folder, recipes)
    prepare_task(config, console, () if cell.evaluation is None else cell.evaluation.benchmarks)
    resumes, trained = checkpoints.last(saved) is not None, (folder / TRAINED).exists()
    write_atomically(folder / CONFIG, resolved(config))
    earlier = plan_of(folder)["versions"] if (resumes or trained) and (folder / PLAN).exists() else []
    used = earlier if (now := versions()) in earlier else [*earlier, now]
    write_atomically(folder / PLAN, json.dumps(asdict(cell) | {"versions": used}, indent=2) + "\n")
    (folder / FAILURE).unlink(missing_ok=True)

    # After a failed evaluation the training is not repeated.
    if not trained:
        checkpoints.settle(saved)
        # Attempts that left no checkpoint are not part of this run.
        for attempt in () if resumes else attempts(folder):
            move_aside(attempt)
        train(
            [*cell.overrides, f"trainer.default_local_dir={hydra_value(saved)}", "trainer.resume_mode=auto"],
            folder / f"attempt-{len(attempts(folder)) + 1}",
            config_dir=recipes,
            config_name=cell.recipe,
            console=console,
        )
        write_atomically(folder / TRAINED, "")
    if cell.evaluation is not None and not (folder / EVALUATION / METRICS).exists():
        if (step := checkpoints.last(saved)) is None:
            raise FileNotFoundError(f"{folder} has no checkpoint to evaluate: set trainer.save_freq in the suite")
        model, output = saved / f"global_step_{step}", folder / EVALUATION
        options: dict[str, Any] = {"recipe": cell.recipe, "overrides": cell.overrides, "recipes": recipes}
        evaluate(model, cell.evaluation, output, **options, train=train, console=console)
    result = {"finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "seconds": time.time() - started}
    write_atomically(folder / RESULT, json.dumps(result, indent=2) + "\n")


def plan_of(folder: Path) -> dict[str, Any]:
    """The cell.json of a cell. `versions` lists those that started the training and, if different, continued it."""
    plan = json.loads((folder / PLAN).read_text())
    # Version 0.1 had two keys instead of `versions`, and only one trainer.
    return {
        "trainer": "verl",
        "versions": [plan[key] for key in ("ran_with",) if key in plan] + plan.get("went_on_with", []),
    } | plan


def record_failure(folder: Path, error: BaseException) -> None:
    """Writes why a cell failed, for `state` and the report."""
    failure = {"error": f"{type(error).__name__}: {error}"}
    if isinstance(error, launch.TrainingFailedError):
        failure |= {"log": str(error.log), "excerpt": error.excerpt}
    write_atomically(folder / FAILURE, json.dumps(failure, indent=2) + "\n")


def versions() -> dict[str, str | None]:
    """Packages, interpreter, machine, and the commit of the checkout (`+` if it has changes)."""
    describe = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    commit = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout
    return {name: version(name) for name in ("verl", "verl-sspo", "torch", "transformers")} | {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "commit": commit.strip() or None,
    }
