"""`verl-sspo COMMAND`: the front door to the commands of this package.

Each command lives in the room it belongs to and parses its own arguments; it is imported only when it is called.
"""

import argparse
import importlib
import sys

# command: (module with `main(argv) -> exit status`, the extra of pyproject.toml it needs, what it does).
COMMANDS = {
    "quickstart": ("verl_sspo.quickstart.__main__", "report", "train a tiny model with SSPO on a laptop"),
    "doctor": ("verl_sspo.doctor.__main__", None, "check a machine, a recipe and its overrides before a run"),
    "prepare-data": ("verl_sspo.data.__main__", "data", "turn a data set into verl's rows"),
    "prepare-model": ("verl_sspo.data.language_model", "data", "make a small pretrained language model"),
    "evaluate": ("verl_sspo.experiments.evaluate", "report", "measure a model or a checkpoint on benchmarks"),
    "reproduce": ("verl_sspo.experiments.reproduce", "report", "run a suite of experiments"),
    "report": ("verl_sspo.experiments.report", "report", "write the tables and pictures of a suite"),
    "benchmark": ("verl_sspo.benchmark.__main__", "report", "measure speed and memory beside verl's own code"),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="verl-sspo",
        description="Soft Sequence Policy Optimization (SSPO) for verl.",
        epilog="commands:\n"
        + "\n".join(f"  {name:14}{purpose}" for name, (_, _, purpose) in COMMANDS.items())
        + "\n\nexample: verl-sspo doctor --config-name gsm8k algo=sspo\n`verl-sspo COMMAND --help` explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    arguments = sys.argv[1:] if argv is None else argv
    # What follows the command is the command's own.
    command = parser.parse_args(arguments[:1]).command
    module, extra, _ = COMMANDS[command]
    try:
        return importlib.import_module(module).main(arguments[1:])
    except ModuleNotFoundError as error:
        if extra is None or (error.name or "").startswith("verl_sspo"):
            raise
        print(f"`verl-sspo {command}` needs {error.name}: pip install 'verl-sspo[{extra}]'", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
