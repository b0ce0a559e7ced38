"""Quickstart: a tiny model learns to carry, with SSPO, in verl's own main_ppo, without a GPU.

    python -m verl_sspo.quickstart [--run-dir runs/quickstart] [--resume] [Hydra overrides ...]

Prepares the task (once), trains, and ends with a table, `summary.json` and `curves.png` in the run folder. An earlier
run there is renamed; with --resume, and the same overrides, it goes on from its last checkpoint instead, which it has
if it ran with, say, trainer.save_freq=8.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from verl_sspo.doctor.configuration import configuration_findings
from verl_sspo.doctor.environment import data_findings
from verl_sspo.quickstart import task as arithmetic
from verl_sspo.quickstart.model import prepare_arithmetic
from verl_sspo.report.curves import draw
from verl_sspo.report.summary import Metrics, summarize, table
from verl_sspo.run import checkpoints, launch, settings
from verl_sspo.run.compose import RECIPES, compose_config
from verl_sspo.run.overrides import hydra_value
from verl_sspo.run.processes import running_in


def caption(config: DictConfig) -> str:
    """What ran, in a sentence."""
    task, data, rollout, actor = (
        config.task,
        config.data,
        config.actor_rollout_ref.rollout,
        config.actor_rollout_ref.actor,
    )
    loss = actor.policy_loss
    method = loss.loss_mode.upper()
    if loss.loss_mode == "sspo":
        variable = "log-ratio" if loss.gate_domain == "log" else "ratio"
        method += f", {loss.gate} gate of the {variable}, τ {loss.tau_pos:g} / {loss.tau_neg:g}, side: {loss.gate_side}"
    updates = data.train_batch_size // actor.ppo_mini_batch_size * actor.ppo_epochs
    return (
        f"{task.digits}-digit additions with worked steps; a tiny Qwen2 whose teacher forgot to carry. "
        f"{method}. A step: {data.train_batch_size} prompts × {rollout.n} responses, {updates} updates; "
        f"learning rate {actor.optim.lr:g}, seed {task.seed}. "
        "Responses are sampled at temperature 1, for validation too."
    )


def main(argv: list[str] | None = None) -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/quickstart"), help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the run folder")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. algo=gspo task.seed=1")
    arguments = parser.parse_intermixed_args(argv)
    console = Console(stderr=True)
    # Saving 0.5 MB needs no progress bar.
    disable_progress_bar()

    try:
        digits = compose_config("quickstart", arguments.overrides, RECIPES).task.digits
    except (HydraException, OmegaConfBaseException) as error:
        parser.error(str(error))
    overrides = [
        f"data.max_prompt_length={arithmetic.prompt_length(digits)}",
        f"data.max_response_length={arithmetic.response_length(digits)}",
        f"trainer.default_local_dir={hydra_value(arguments.run_dir.resolve() / 'checkpoints')}",
        *arguments.overrides,
        f"trainer.resume_mode={'auto' if arguments.resume else 'disable'}",
    ]
    config = compose_config("quickstart", overrides, RECIPES)
    if errors := [finding for finding in configuration_findings(config) if finding.severity == "error"]:
        parser.error("\n".join(map(str, errors)))
    try:
        prepare_arithmetic(
            Path(config.task.folder).parent,
            digits=digits,
            seed=config.task.seed,
            heads=config.task.heads,
            console=console,
        )
    except ValueError as error:
        parser.error(str(error))
    if errors := [finding for finding in data_findings(config) if finding.severity == "error"]:
        parser.error("\n".join(map(str, errors)))
    if (pid := running_in(arguments.run_dir)) is not None:
        parser.error(f"process {pid} still trains in {arguments.run_dir}: end it first, or choose another --run-dir")

    saved = Path(config.trainer.default_local_dir).resolve()
    try:
        step = checkpoints.settle(saved) if arguments.resume else None
    except ValueError as error:
        parser.error(str(error))
    if step is not None:
        if changed := settings.changed(config, saved):
            parser.error(
                f"the run in {arguments.run_dir} has other settings: {', '.join(changed[:5])}; give the same "
                "overrides, or another --run-dir"
            )
        launch.keep_attempt(arguments.run_dir)
        console.print(f"going on from the checkpoint of step {step}", highlight=False)
    elif not saved.is_relative_to(arguments.run_dir.resolve()) and checkpoints.last(saved) is not None:
        parser.error(
            f"{saved} has the checkpoints of another run: choose another trainer.default_local_dir, or go on from them "
            "with --resume"
        )
    elif aside := launch.move_aside(arguments.run_dir):
        reason = f"; starting anew: there is no complete checkpoint in {saved}" if arguments.resume else ""
        console.print(f"earlier run moved to {aside}{reason}", highlight=False)
    settings.keep(config, saved)
    console.print(f"training; everything verl prints goes to {arguments.run_dir / launch.LOG}", highlight=False)
    try:
        launch.train(overrides, arguments.run_dir, config_dir=RECIPES, config_name="quickstart", console=console)
    except (launch.TrainingFailedError, KeyboardInterrupt) as error:
        if isinstance(error, launch.TrainingFailedError):
            launch.report_failure(error, console)
        else:
            console.print(f"interrupted; what there is stands in {arguments.run_dir}", highlight=False)
        if (step := checkpoints.last(saved)) is not None:
            console.print(f"the same command with --resume goes on from the checkpoint of step {step}", highlight=False)
        return 1 if isinstance(error, launch.TrainingFailedError) else 130

    metrics = Metrics.read_attempts([*launch.attempts(arguments.run_dir), arguments.run_dir])
    summary = summarize(metrics, seconds=time.monotonic() - started)
    (arguments.run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    name = config.actor_rollout_ref.actor.policy_loss.loss_mode.upper()
    title = f"{name} teaches a tiny model to carry"
    picture = draw(metrics, arguments.run_dir / "curves.png", title, caption(config))
    out = Console()
    out.print(table(summary, f"Quickstart: {title}"))
    out.print(f"picture: {picture}\nfigures: {arguments.run_dir / 'summary.json'}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
