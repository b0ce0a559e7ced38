"""Compares the project with verl's own code and transformers, side by side in one run, and prints ratios.

    verl-sspo benchmark                              everything
    verl-sspo benchmark --quick                      smaller sizes, a few minutes
    verl-sspo benchmark --only losses advantages
    verl-sspo benchmark --output docs/performance    also writes results.md there

The report goes to stdout, progress to stderr. Use an otherwise idle machine.
"""

import argparse
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import tabulate  # noqa: F401  pandas needs it for Markdown: fails now, not after measuring
import torch

from verl_sspo.benchmark import advantages, losses, noise, rollout, sandbox, startup, step
from verl_sspo.benchmark.measure import Section
from verl_sspo.cli import output_folder
from verl_sspo.quickstart.model import prepare_arithmetic

SECTIONS = ("losses", "advantages", "rollout", "sandbox", "startup", "step", "noise")
SIZES = ((4, 512), (8, 4096), (64, 16384))  # (micro-batch, response length)
GPU_SIZES = ((512, 2048), (4, 131072))
NOISE_LENGTHS = (20, 200, 2000)  # tokens
PACKAGES = ("verl-sspo", "verl", "torch", "transformers", "numpy", "ray")


def measure(section: str, device: torch.device, quick: bool, metrics: Path, models: Sequence[Path]) -> list[Section]:
    seconds = 2 if quick else 30
    if section == "losses":
        sizes = SIZES[:2] if quick else SIZES + (GPU_SIZES if device.type == "cuda" else ())
        return losses.measure(sizes, device, seconds)
    if section == "advantages":
        return advantages.measure((512,) if quick else (512, 8192, 65536), 1024, seconds / 2)
    if section == "rollout":
        return rollout.measure(128, (32,) if quick else (32, 256), seconds)
    if section == "sandbox":
        return sandbox.measure(4 if quick else 32, seconds)
    if section == "startup":
        return startup.measure(3 if quick else 9)
    if section == "step":
        return step.measure(metrics)
    return measure_noise(models, device, NOISE_LENGTHS[:2] if quick else NOISE_LENGTHS)


def measure_noise(models: Sequence[Path], device: torch.device, lengths: Sequence[int]) -> list[Section]:
    """The noise of log-probs, for these models or else the quickstart's."""
    loaded = [noise.load(folder) for folder in models]
    if not loaded:
        with tempfile.TemporaryDirectory() as folder:
            path = prepare_arithmetic(Path(folder), digits=1, train_size=64, val_size=16) / "model"
            loaded = [("the quickstart's model", *noise.load(path)[1:])]
    tables = []
    for name, model, prompt in loaded:
        model.to(device)  # type: ignore[arg-type]  # transformers wraps it
        tables += noise.measure(name, model, prompt, lengths)
    return [Section(title, note, pd.DataFrame(rows).set_index(next(iter(rows[0])))) for title, note, rows in tables]


def machine(device: torch.device) -> dict[str, Any]:
    """The machine and versions that the figures depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    described = {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load before": round(os.getloadavg()[0], 2),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "python": platform.python_version(),
    }
    return described | {name: version(name) for name in PACKAGES}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller sizes, fewer rounds")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="default: all of them")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="for losses and noise; default: %(default)s"
    )
    parser.add_argument(
        "--quickstart-metrics",
        type=Path,
        default=Path("runs/quickstart/sspo/metrics.jsonl"),
        help="metrics of a run, for `step`; default: %(default)s",
    )
    parser.add_argument(
        "--models",
        type=Path,
        nargs="+",
        default=(),
        help="Hugging Face folders, for `noise`; default: the quickstart's model",
    )
    parser.add_argument("--output", type=output_folder, help="folder for results.md")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device")

    device = torch.device(arguments.device)
    command = shlex.join(["verl-sspo", "benchmark", *(sys.argv[1:] if argv is None else argv)])
    where = machine(device)
    if where["load before"] > 0.5:
        print(f"The machine is busy (load {where['load before']}): do not publish these figures.", file=sys.stderr)
    sections: list[Section] = []
    for name in arguments.only:
        print(f"measuring {name}", file=sys.stderr, flush=True)
        sections += measure(name, device, arguments.quick, arguments.quickstart_metrics, arguments.models)

    heading = pd.Series(where, name="").rename_axis("machine").to_markdown()
    text = "\n\n".join([f"Measured with `{command}`.", heading, *(section.as_markdown() for section in sections)])
    print(text)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "results.md").write_text(f"# Measured figures\n\n{text}\n")
    return 0
