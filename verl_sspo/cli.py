"""The command line: `verl-sspo COMMAND`, or `python -m verl_sspo COMMAND`.

A command is a module with `main(argv)`, which parses its own arguments and is imported only when called. This module
imports little, so that Ctrl-C prints a single line even during startup.
"""

import argparse
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

# command: (its module, what it does).
COMMANDS = {
    "quickstart": ("verl_sspo.quickstart.command", "train a tiny or a small language model on a laptop"),
    "train": ("verl_sspo.run.train", "check, train and resume a recipe in a run folder"),
    "doctor": ("verl_sspo.doctor.command", "check a machine, a recipe and its overrides before a run"),
    "prepare-data": ("verl_sspo.data.command", "convert a data set to verl's format"),
    "prepare-model": ("verl_sspo.data.language_model", "make a small pretrained language model"),
    "evaluate": ("verl_sspo.experiments.evaluate", "measure a model or a checkpoint on benchmarks"),
    "reproduce": ("verl_sspo.experiments.reproduce", "run a suite of experiments"),
    "report": ("verl_sspo.experiments.report", "write the tables and pictures of a suite"),
    "gpu-check": ("verl_sspo.benchmark.gpu_check", "check the GPU kernel of the loss, with or without a GPU"),
    "benchmark": ("verl_sspo.benchmark.command", "compare speed and memory with verl's own code"),
}


def extra_with(package: str | None) -> str | None:
    """The extra of this distribution that installs `package`, or None."""
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    for requirement in map(Requirement, requires("verl-sspo") or []):  # base requirements come first
        if requirement.name == package:
            return str(requirement.marker).split('"')[1] if requirement.marker else None  # extra == "report"
    return None


def at_least(low: int) -> Callable[[str], int]:
    """An argparse type: an integer of at least `low`."""

    def integer(text: str) -> int:
        if not text.lstrip("+-").isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {low}, got {text!r}")
        return int(text)

    return integer


def output_folder(text: str) -> Path:
    """An argparse type: a folder that is writable or can be created."""
    path = Path(text).expanduser().resolve()
    there = next(each for each in (path, *path.parents) if each.exists())
    if not (text and there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise argparse.ArgumentTypeError(f"{text!r}: {there} is not a folder to write to")
    return path


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit status: 1 with a hint if an extra is not installed, 130 after Ctrl-C."""
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        # Commands with more to say catch it themselves. This also covers their import.
        print("\nverl-sspo: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        print(f"verl-sspo: {error}", file=sys.stderr)
        return 1


def _run(argv: list[str]) -> int:
    import importlib

    parser = argparse.ArgumentParser(
        prog="verl-sspo",
        description="Soft Sequence Policy Optimization (SSPO) for verl.",
        epilog="commands:\n"
        + "\n".join(f"  {name:14}{purpose}" for name, (_, purpose) in COMMANDS.items())
        + "\n\nexample: verl-sspo doctor --config-name gsm8k algo=sspo\n`verl-sspo COMMAND --help` explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    # The rest belongs to the command.
    command = parser.parse_args(argv[:1]).command
    sys.argv[0] = f"verl-sspo {command}"  # what argparse calls the program in its help
    try:
        return importlib.import_module(COMMANDS[command][0]).main(argv[1:])
    except ModuleNotFoundError as error:
        if (extra := extra_with(error.name)) is None:
            raise
        print(f"verl-sspo {command} needs {error.name}: pip install 'verl-sspo[{extra}]'", file=sys.stderr)
        return 1
