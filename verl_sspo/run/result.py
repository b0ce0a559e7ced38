"""Describes a run in a few lines, and prints its result: a table, some answers, its files, and what to do next."""

import json
import re
import shlex
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig
from rich.console import Console

from verl_sspo.report import samples
from verl_sspo.report.summary import SECONDS_PER_STEP, read_attempts, series, summarize, table
from verl_sspo.run import checkpoints
from verl_sspo.run.folder import ANSWERS, LOG, METRICS, SUMMARY, attempts, write_atomically
from verl_sspo.run.screen import say


def headline(config: DictConfig, task: str) -> list[str]:
    """Describes a run in a few lines."""
    actor, loss = config.actor_rollout_ref.actor, config.actor_rollout_ref.actor.policy_loss
    method = loss.loss_mode.upper()
    if loss.loss_mode == "sspo":
        domain = ("mean " if loss.get("gate_level") == "sequence" else "") + (
            "log-ratio" if loss.gate_domain == "log" else "ratio"
        )
        side = "" if loss.gate_side == "both" else ", forward side only"
        method += f", {loss.gate} gate of the {domain}{side}, temperatures {loss.tau_pos:g} and {loss.tau_neg:g}"
    updates = config.data.train_batch_size // actor.ppo_mini_batch_size * actor.ppo_epochs
    responses = f"{config.data.train_batch_size} prompts x {config.actor_rollout_ref.rollout.n} responses"
    plural = "s" if updates != 1 else ""
    return [
        f"{task}: {method}",
        f"each step: {responses}, {updates} update{plural} at learning rate {actor.optim.lr:g}",
        f"model: {config.actor_rollout_ref.model.path}, {config.trainer.nnodes} x {config.trainer.n_gpus_per_node} "
        + ("CPU processes" if config.trainer.device == "cpu" else "GPUs"),
    ]


def read_metrics(run_dir: Path) -> pd.DataFrame:
    """The metrics of all starts of a run."""
    return read_attempts([*attempts(run_dir), run_dir])


def report(
    config: DictConfig, task: str, overrides: list[str], run_dir: Path, command: str, seconds: float | None = None
) -> None:
    """Writes `summary.json` and prints the result of a complete run.

    Args:
        config: its configuration.
        task: its recipe.
        overrides: the user's Hydra overrides.
        run_dir: its folder.
        command: the command that continues it.
        seconds: wall time of the training command; default: the sum over the steps.
    """
    out, metrics, summary = Console(), read_metrics(run_dir), run_dir / SUMMARY
    saved = Path(config.trainer.default_local_dir)
    answers = Path(config.trainer.validation_data_dir or run_dir / ANSWERS)
    step = checkpoints.last(saved)
    # There are no steps if the user leaves out the logger `file`, or if the run only validates.
    if len(durations := series(metrics, SECONDS_PER_STEP)):
        if seconds is not None or not summary.exists():
            figures = summarize(metrics, seconds=float(durations.sum()) if seconds is None else seconds)
            write_atomically(summary, json.dumps(figures, indent=2) + "\n")
        loss = config.actor_rollout_ref.actor.policy_loss.loss_mode
        out.print(table(json.loads(summary.read_text()), f"{task}: {loss.upper()}"))
    if found := samples.read_samples(answers):
        say(out, "answers of the first and the last validation to the same problems:\n")
        say(out, "\n".join("\n".join(samples.lines(each)) + "\n" for each in found))
    places = {"log": run_dir / LOG, "metrics": run_dir / METRICS, "figures": summary, "answers": answers}
    places |= {"checkpoints": saved} if step is not None else {}
    for name, place in places.items():
        if place.exists():
            say(out, f"{name:13} {short(place)}")
    if step is not None:
        same = [each for each in overrides if not each.startswith("trainer.")]
        words = ["verl-sspo", "evaluate", short(saved / f"global_step_{step}"), "--recipe", task, *same]
        say(out, f"{'evaluate':13} {shlex.join(words)}")
        longer = re.sub(r" trainer\.total_training_steps=\S+", "", command)
        say(out, f"{'train longer':13} {longer} trainer.total_training_steps=N")


def short(path: Path) -> str:
    """A path, relative to the current folder if it is inside."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
