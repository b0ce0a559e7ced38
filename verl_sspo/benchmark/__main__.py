"""Measures the project beside verl's own code and transformers, side by side in one run, and prints ratios.

    verl-sspo benchmark                            everything
    verl-sspo benchmark --quick                    smaller sizes, about a minute
    verl-sspo benchmark --only losses,advantages --threads 1
    verl-sspo benchmark --output docs/performance  also write results.md and results.json there

The table goes to stdout, progress to stderr. `step` reads the metrics of a run of verl_sspo.quickstart.
"""

import argparse
import contextlib
import json
import shlex
import sys
from pathlib import Path

import torch

from verl_sspo.benchmark import advantages, losses, machine, rollout, sandbox, step
from verl_sspo.benchmark.table import NotMeasuredError, Section, markdown_table

SECTIONS = ("losses", "advantages", "rollout", "sandbox", "step")

# (micro-batch, response length); those that do not fit into memory are left out with a word.
SIZES = ((4, 512), (8, 2048), (16, 8192), (64, 8192), (64, 32768))
LARGE_SIZES = ((256, 32768), (512, 65536), (1024, 131072))  # only on a GPU


def measure(section: str, arguments: argparse.Namespace) -> list[Section]:
    quick = arguments.quick
    device = torch.device(arguments.device)
    if section == "losses":
        sizes = SIZES[:3] if quick else SIZES + (LARGE_SIZES if device.type == "cuda" else ())
        return losses.measure(sizes, device, seconds=2 if quick else 30)
    if section == "advantages":
        responses = (512, 8192) if quick else (512, 2048, 8192, 32768, 65536)
        return advantages.measure(responses, tokens=1024, seconds=2 if quick else 15)
    if section == "rollout":
        return rollout.measure(128, (32,) if quick else (32, 256), seconds=3 if quick else 30)
    if section == "sandbox":
        return sandbox.measure(4 if quick else 32, seconds=3 if quick else 30)
    return step.measure(arguments.quickstart_metrics)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller sizes, fewer rounds")
    parser.add_argument("--only", default=",".join(SECTIONS), help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU; by default its own choice")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the losses")
    parser.add_argument(
        "--quickstart-metrics",
        type=Path,
        default=Path("runs/quickstart/sspo/metrics.jsonl"),
        help="what `step` reads; default: that of the last verl_sspo.quickstart",
    )
    parser.add_argument("--output", type=Path, help="folder for results.md and results.json")
    arguments = parser.parse_args(argv)
    asked = arguments.only.split(",")
    if unknown := sorted(set(asked) - set(SECTIONS)):
        parser.error(f"--only: {', '.join(unknown)} unknown, choose from {', '.join(SECTIONS)}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    command = shlex.join(["verl-sspo", "benchmark", *(sys.argv[1:] if argv is None else argv)])
    where = machine.describe(torch.device(arguments.device))
    if where[machine.LOAD] > 0.5:
        print(f"the machine is busy (load {where[machine.LOAD]}): do not publish these figures", file=sys.stderr)
    measured: list[Section] = []
    missing = 0
    for name in asked:
        print(f"measuring {name}", file=sys.stderr, flush=True)
        try:
            # The loss announces its settings on stdout.
            with contextlib.redirect_stdout(sys.stderr):
                measured += measure(name, arguments)
        except NotMeasuredError as error:
            print(f"{name}: {error}", file=sys.stderr)
            measured.append(Section(name.capitalize(), f"Not measured: {error}"))
            missing += 1

    heading = markdown_table(["Machine", ""], [[key, str(value)] for key, value in where.items()])
    text = "\n\n".join([f"Measured with `{command}`.", heading, *(section.as_markdown() for section in measured)])
    print(text)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "results.md").write_text(f"# Measured figures\n\n{text}\n")
        document = {"command": command, "machine": where, "sections": [section.as_json() for section in measured]}
        (arguments.output / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
