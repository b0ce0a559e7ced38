"""Trains a recipe: checks the settings first, resumes an interrupted run, and leaves no process behind.

    verl-sspo train gsm8k algo=gspo hardware=fsdp_1gpu model=qwen2.5_1.5b_instruct

TASK is a recipe of this package or of --config-dir, or one of verl's own configurations. Hydra overrides follow, as for
verl's main_ppo. The run folder is runs/TASK/ALGORITHM. Run the same command again to resume from the last checkpoint
there; different settings are refused. Relative paths start at the current folder. RAY_ADDRESS=auto joins a running Ray
cluster.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from verl_sspo.cli import output_folder
from verl_sspo.compose import RECIPES, compose_config, hydra_value
from verl_sspo.run import checkpoints, launch, settings
from verl_sspo.run.folder import ANSWERS, DOCTOR, LOG, keep_attempt, move_aside, write_atomically
from verl_sspo.run.processes import running_in
from verl_sspo.run.result import headline, report, short
from verl_sspo.run.screen import say
from verl_sspo.run.task import prepare_task, whole_paths


class NotStartedError(Exception):
    """Why a training was not started, in one line."""


def parse(
    argv: list[str] | None, description: str | None, tasks: Mapping[str, str] | None = None
) -> argparse.Namespace:
    """Parses the command line of `train`, or with `tasks` that of `quickstart`, whose `--model` selects a task."""
    name = "train" if tasks is None else "quickstart"
    parser = argparse.ArgumentParser(
        prog=f"verl-sspo {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if tasks is None:
        parser.add_argument("task", metavar="TASK", help="a recipe, e.g. gsm8k, math, code, quickstart")
    else:
        parser.add_argument("--model", choices=tasks, default=next(iter(tasks)), help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", default=[], metavar="OVERRIDE", help="Hydra overrides, e.g. algo=gspo")
    parser.add_argument("--config-dir", type=Path, default=RECIPES, help="folder with your own recipes")
    parser.add_argument(
        "--run-dir",
        type=output_folder,
        default=os.environ.get("RUN_DIR"),
        help="default: $RUN_DIR, or runs/TASK/ALGORITHM",
    )
    parser.add_argument("--verbose", action="store_true", help="also show everything that verl prints")
    parser.add_argument(
        "--force", action="store_true", default=os.environ.get("FORCE") == "1", help="train despite errors (or FORCE=1)"
    )
    arguments = parser.parse_intermixed_args(argv)
    if tasks is None:
        arguments.words = ["train", arguments.task]
    else:
        default = arguments.model == parser.get_default("model")
        arguments.task = tasks[arguments.model]
        arguments.words = ["quickstart"] if default else ["quickstart", "--model", arguments.model]
    return arguments


def main(argv: list[str] | None = None) -> int:
    return run(parse(argv, __doc__))


def run(arguments: argparse.Namespace) -> int:
    """Trains with the arguments of `parse`; sets their `config` and `run_dir`, and returns the exit status."""
    console = Console(stderr=True)
    try:
        with launch.signals_interrupt():
            return _run(arguments, console)
    except KeyboardInterrupt:
        console.print("Interrupted before the training had started.")
        return 130
    except NotStartedError as error:
        why = str(error)
    except OSError as error:
        why = _unwritten(arguments, error)
    say(console, f"Not started: {why}", style="bold red")
    return 2


def _run(arguments: argparse.Namespace, console: Console) -> int:
    started = time.monotonic()
    say(console, "Checking settings, data and model")
    address = os.environ.get("RAY_ADDRESS") or "local"
    config, overrides = _compose(arguments)
    arguments.config = config
    run_dir, saved = arguments.run_dir, Path(config.trainer.default_local_dir).resolve()
    with _locked(run_dir):
        step = _step_to_resume(config, run_dir, saved)
        total = _total_steps(config, run_dir, saved)
        if step is not None and total is not None and step >= total:
            say(
                console,
                f"Complete: {run_dir} is trained to step {step} of {total}. To train longer, raise trainer."
                "total_training_steps or total_epochs; to train anew, add trainer.resume_mode=disable.",
            )
            report(config, arguments.task, arguments.overrides, run_dir, _command(arguments))
            return 0
        findings = _check(config, address, console)
        if any(each.severity == "error" for each in findings) and not arguments.force:
            raise NotStartedError("correct the errors above, or train despite them with --force (FORCE=1)")
        if config.trainer.resume_mode == "auto":
            try:
                checkpoints.settle(saved)
            except ValueError as error:
                raise NotStartedError(str(error)) from error
        if step is not None:
            keep_attempt(run_dir)
            say(console, f"Resuming from the checkpoint of step {step}")
        elif (run_dir / LOG).exists() or (saved.is_relative_to(run_dir) and saved.exists()):
            say(console, f"No checkpoint to resume from: starting anew. The earlier run is now {move_aside(run_dir)}")
        settings.keep(config, saved)
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(run_dir / DOCTOR, json.dumps([asdict(each) for each in findings], indent=2) + "\n")
        for line in headline(config, arguments.task):
            say(console, line)
        say(console, f"log: {short(run_dir / LOG)}\nStarting takes a minute or more, then each step prints a line.")
        try:
            launch.train(
                overrides,
                run_dir,
                config_dir=arguments.config_dir,
                config_name=arguments.task,
                console=console,
                address=address,
                total=total,
                verbose=arguments.verbose,
            )
            seconds = time.monotonic() - started
            report(config, arguments.task, arguments.overrides, run_dir, _command(arguments), seconds)
            return 0
        except launch.TrainingFailedError as error:
            launch.report_failure(error, console)
            for folder in {run_dir, saved} if error.cause == launch.FULL else ():
                say(console, f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB are free in {short(folder)}")
            status = 1
        except OSError as error:
            # The disk may fill after the last step.
            say(console, _unwritten(arguments, error), style="bold red")
            status = 1
        except KeyboardInterrupt:
            say(console, f"Interrupted. Log: {short(run_dir / LOG)}")
            status = 130
        _say_how_to_resume(arguments, saved, console)
        return status


def _compose(arguments: argparse.Namespace) -> tuple[DictConfig, list[str]]:
    """The configuration, and the overrides for main_ppo: those that name the run folder, then the user's."""
    given = arguments.overrides
    try:
        config = compose_config(arguments.task, given, arguments.config_dir)
    except (HydraException, OmegaConfBaseException, FileNotFoundError, ValueError) as error:
        # Drop Hydra's search path: a dozen lines that do not help with a misspelt name.
        text = re.split(r"Config search path|Set the environment variable|\n\s+object_type", str(error))[0]
        raise NotStartedError(" ".join(text.split())) from error
    if arguments.run_dir is None:
        groups = [each.split("=", 1)[1] for each in given if re.match(r"\+?algo=", each)]
        algorithm = groups[-1] if groups else config.actor_rollout_ref.actor.policy_loss.loss_mode
        arguments.run_dir = Path("runs") / arguments.task / algorithm
    run_dir = arguments.run_dir = Path(arguments.run_dir).resolve()
    ours = {"default_local_dir": run_dir / "checkpoints", "validation_data_dir": run_dir / ANSWERS}
    for key, path in ours.items():
        if not any(each.startswith(f"trainer.{key}=") for each in given):
            config.trainer[key] = str(path)
    return config, [*(f"trainer.{key}={hydra_value(path)}" for key, path in ours.items()), *given]


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Keeps other starts out of the run folder until this process ends, even if it is killed."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(run_dir.with_name(f".{run_dir.name}.lock")).acquire(timeout=0)
    except Timeout:
        raise NotStartedError(f"another start is training in {run_dir}: end it, or choose another --run-dir") from None
    with lock:
        # A main_ppo whose launcher and guard were both killed keeps training, without the lock.
        if (pid := running_in(run_dir)) is not None:
            raise NotStartedError(f"process {pid} is still training in {run_dir}: end it, or choose another --run-dir")
        yield


def _check(config: DictConfig, address: str, console: Console) -> list[Any]:
    """Runs the doctor, and prints errors and warnings as they are found. Makes the data of a toy task."""
    made_here = OmegaConf.select(config, "task.prepare") is not None
    if not made_here:
        _prepare(config, console)
    # These import torch and verl, which takes ten seconds. Errors in the command line were reported before.
    from verl_sspo.doctor import Finding, environment
    from verl_sspo.doctor.configuration import configuration_findings

    found: list[Finding] = []

    def tell(findings: Iterable[Finding]) -> None:
        for each in findings:
            found.append(each)
            if each.severity != "ok":
                say(console, str(each))

    tell(configuration_findings(config))
    # The other checks read values that may be wrong.
    if any(each.severity == "error" for each in found):
        return found
    if made_here:
        _prepare(config, console)
    tell(environment.package_findings(config))
    tell(environment.data_findings(config))
    tell(environment.model_findings(config))
    if address == "local":
        tell(environment.accelerator_findings(config))
    else:
        # Check the paths that main_ppo gets.
        config = config.copy()
        for key, path in whole_paths(config).items():
            OmegaConf.update(config, key, path)
        tell(environment.registration_findings(address, config))
    return found


def _prepare(config: DictConfig, console: Console) -> None:
    try:
        prepare_task(config, console)
    except (ValueError, FileNotFoundError) as error:
        raise NotStartedError(str(error)) from error


def _step_to_resume(config: DictConfig, run_dir: Path, saved: Path) -> int | None:
    """The step of the checkpoint to resume from, if there is one."""
    if config.trainer.resume_mode == "auto":
        step = checkpoints.last(saved)
        if step is not None and (changed := settings.changed(config, saved)):
            raise NotStartedError(
                f"the run in {run_dir} has other settings: {', '.join(changed[:5])}. Give the same overrides or "
                "another --run-dir, or add trainer.resume_mode=disable to train anew (the earlier run is then renamed)"
            )
        return step
    # The run folder will be renamed, with the checkpoints in it.
    if not saved.is_relative_to(run_dir) and checkpoints.last(saved) is not None:
        raise NotStartedError(f"{saved} has checkpoints of another run: choose another trainer.default_local_dir")
    return None


def _total_steps(config: DictConfig, run_dir: Path, saved: Path) -> int | None:
    """The number of training steps, from the configuration or from verl's count in an earlier start."""
    if config.trainer.total_training_steps is not None:
        return config.trainer.total_training_steps
    log, kept = run_dir / LOG, saved / settings.KEPT
    if log.exists() and kept.exists():
        before = OmegaConf.load(kept).trainer
        if (before.total_epochs, before.total_training_steps) == (config.trainer.total_epochs, None):
            counted = launch.TOTAL_STEPS.search(log.read_text(encoding="utf-8", errors="replace"))
            return int(counted[1]) if counted else None
    return None


def _unwritten(arguments: argparse.Namespace, error: OSError) -> str:
    return f"{error.filename or arguments.run_dir}: {error.strerror or error}"


def _say_how_to_resume(arguments: argparse.Namespace, saved: Path, console: Console) -> None:
    step, total = checkpoints.last(saved), _total_steps(arguments.config, arguments.run_dir, saved)
    if step is None:
        then = "starts anew, no checkpoint was saved"
    elif total is not None and step >= total:
        then = f"shows the result: the training is complete, step {step} of {total} is saved"
    else:
        then = f"resumes from step {step}"
    say(console, f"This command {then}:\n  {_command(arguments)}")


def _command(arguments: argparse.Namespace) -> str:
    """The shell command that continues this run."""
    beside = Path(sys.executable).with_name("verl-sspo")
    program = "verl-sspo" if shutil.which("verl-sspo") in (str(beside), None) else short(beside)
    words = [program, *arguments.words, "--run-dir", short(arguments.run_dir)]
    if arguments.config_dir != RECIPES:
        words += ["--config-dir", str(arguments.config_dir)]
    words += ["--force"] if arguments.force else []
    words += [each for each in arguments.overrides if each != "trainer.resume_mode=disable"]
    address = os.environ.get("RAY_ADDRESS")
    return (f"RAY_ADDRESS={shlex.quote(address)} " if address else "") + shlex.join(words)
