"""Checks the Triton kernel of the loss: exact results, no register spills, and its speed on a GPU.

    verl-sspo gpu-check                 on a machine with a GPU; writes docs/results/gpu. Has never run
    verl-sspo gpu-check --without-gpu   in Triton's interpreter, and compiled for GPUs that need not be there

Prints a table. The exit status is 1 if a check fails. Needs only torch, numpy and Triton, and no installation:
`python -m verl_sspo gpu-check` in a clone. With verl it also measures speed, with transformers the noise of log-probs.
"""

import argparse
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from verl_sspo.algorithm.gates import DOMAINS, SHAPES, SIDES, Gate
from verl_sspo.algorithm.loss import sspo_loss

# One token, less than a block, around a block, and several blocks.
LENGTHS = (1, 7, 1023, 1025, 5000)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# NVIDIA A100, H100 and B200, AMD MI300.
TARGETS: dict[str, tuple] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# Relative to the largest gradient and to 1. Temperatures up to 12 multiply the float32 rounding of a log-ratio.
TOLERANCE = 5e-6
OUTPUT = Path("docs/results/gpu")
NOISE_LENGTHS = (20, 200, 1000)
# Sizes where few rows must fill a GPU, and where many do.
SIZES = ((64, 16384), (8, 4096), (512, 2048), (4, 131072))


def gates() -> Iterator[Gate]:
    """Every gate, domain and side, and one gate of level "sequence", which uses the same kernel."""
    for shape, domain, side in itertools.product(SHAPES, DOMAINS, SIDES):
        if not (shape == "sigmoid" and domain == "ratio" and side == "forward"):
            yield Gate(shape, domain, 10.0, 12.0, side)
    yield Gate("erf", "log", 10.0, 12.0, "forward", "sequence")


def batch(length: int, dtype: torch.dtype, device: str, weighted: bool) -> dict[str, Any]:
    """The arguments of `sspo_loss` except the gate: six responses of `length` tokens with padding.

    One is full, one has holes, one no valid token, one only weights of 0, one infinite log-ratios, one a huge
    log-ratio. Masked values are NaN or infinite.
    """
    random = torch.Generator().manual_seed(0)
    mask = torch.rand(6, length, generator=random) < 0.7
    mask[0], mask[2] = True, False
    log_prob = -2 * torch.rand(6, length, generator=random)
    old_log_prob = log_prob + 0.3 * torch.randn(6, length, generator=random)
    old_log_prob[4, ::3], old_log_prob[4, 1::3] = torch.inf, -torch.inf
    old_log_prob[5, 0] = -60_000.0
    advantages = torch.tensor([1.5, -0.5, 1.0, -1.0, 0.7, -2.0]).unsqueeze(-1).repeat(1, length)
    tensors: dict[str, Any] = {"log_prob": log_prob, "old_log_prob": old_log_prob, "advantages": advantages}
    if weighted:
        weights = 0.5 + torch.rand(6, length, generator=random)
        weights[torch.rand(6, length, generator=random) < 0.2] = 0.0
        weights[3] = 0.0
        tensors["rollout_is_weights"] = weights
    for name, junk in zip(tensors, (torch.nan, torch.inf, -torch.inf, torch.nan), strict=False):
        tensors[name] = tensors[name].masked_fill(~mask, junk).to(dtype).to(device)
    return tensors | {"response_mask": mask.to(device)}


def error(gate: Gate, tensors: dict[str, Any]) -> float:
    """Largest error of the kernel's loss, gradient and diagnostics, against the PyTorch loss in float64."""
    exact = {name: each.cpu() if name == "response_mask" else each.cpu().double() for name, each in tensors.items()}
    results = []
    for kernel, inputs in (("triton", tensors), ("torch", exact)):
        leaf = inputs["log_prob"].detach().clone().requires_grad_()
        loss, diagnostics = sspo_loss(**(inputs | {"log_prob": leaf}), gate=gate, kernel=kernel)
        loss.backward()
        assert leaf.grad is not None
        metrics = torch.tensor(list(diagnostics.as_metrics().values()), dtype=torch.float64)
        results.append((loss.detach().double().cpu(), leaf.grad.double().cpu(), metrics))
    (loss, gradient, metrics), (exact_loss, exact_gradient, exact_metrics) = results
    largest = exact_gradient.abs().max().clamp(min=1e-3)
    # The gradient is returned in the dtype of log_prob.
    rounding = 0.0 if leaf.dtype == torch.float32 else torch.finfo(tensors["log_prob"].dtype).eps
    errors = [
        (loss - exact_loss).abs(),
        (gradient - exact_gradient).abs().max() / largest - rounding,
        ((metrics - exact_metrics).abs() / exact_metrics.abs().clamp(min=1.0)).max(),
    ]
    return float(torch.stack(errors).max())  # NaN if one is NaN


def nan_is_kept(device: str) -> dict[str, Any]:
    """Whether a NaN at a valid token makes the loss NaN."""
    kept = []
    for name in ("log_prob", "old_log_prob", "advantages"):
        tensors = batch(7, torch.float32, device, weighted=False)
        tensors[name][0, 3] = torch.nan
        loss, _ = sspo_loss(**tensors, gate=Gate(), kernel="triton")
        kept.append(bool(loss.isnan()))
    return {"check": "NaN at a valid token", "result": "the loss is NaN", "ok": all(kept)}


def exactness(dtype: torch.dtype, device: str, quick: bool) -> list[dict[str, Any]]:
    """A row per length: the largest error over gates, with and without rollout weights."""
    rows = []
    for length in (7, 257) if quick else LENGTHS:
        chosen = gates() if dtype == torch.float32 or not quick else [Gate(), Gate("sigmoid", "ratio", 1.0, 1.05)]
        inputs = [batch(length, dtype, device, weighted) for weighted in (False, True)]
        largest = max(error(gate, each) for gate in chosen for each in inputs)
        check = f"exact, {length} tokens, {str(dtype).removeprefix('torch.')}"
        rows.append({"check": check, "result": f"largest error {largest:.1e}", "ok": largest <= TOLERANCE})
    return rows


def compiled(quick: bool) -> list[dict[str, Any]]:
    """A row per target and block: the maximum of registers, spills and shared memory over all gates."""
    from verl_sspo.algorithm import kernel

    chosen = [Gate(), Gate("sigmoid", "ratio", 1.0, 1.05)] if quick else list(gates())
    rows = []
    for target, block in itertools.product(TARGETS, kernel.BLOCKS):
        each = [resources(gate, target, block) for gate in chosen]
        used = {name: max(one[name] for one in each) for name in each[0]}
        result = "{registers} registers, {spills} spilled, {shared} bytes of shared memory".format(**used)
        rows.append({"check": f"compiled for {target}, block {block}", "result": result, "ok": used["spills"] == 0})
    return rows


def resources(gate: Gate, target: str, block: int) -> dict[str, int]:
    """Registers, spills and shared memory (bytes) of the largest variant: bfloat16 inputs with rollout weights."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from verl_sspo.algorithm import kernel

    settings = kernel.constants(gate, weighted=True, block=block)
    known = {"mask": "*u8", "gradient": "*fp32", "sums": "*fp32", "tau_pos": "fp32", "tau_neg": "fp32"}
    known |= {"length": "i32", "blocks": "i32"} | dict.fromkeys(settings, "constexpr")
    signature = {name: known.get(name, "*bf16") for name in kernel.sweep_kernel.arg_names}
    source = ASTSource(fn=kernel.sweep_kernel, signature=signature, constexprs=settings)
    binary = compile(source, target=GPUTarget(*TARGETS[target]), options={"num_warps": kernel.WARPS})
    if "amdgcn" in binary.asm:
        found = dict(re.findall(r"\.(vgpr_count|[vs]gpr_spill_count):\s*(\d+)", binary.asm["amdgcn"]))
        registers, spills = found["vgpr_count"], [found["vgpr_spill_count"], found["sgpr_spill_count"]]
    else:
        registers, spills = _from_ptxas(binary.asm["ptx"])
    return {"registers": int(registers), "spills": sum(map(int, spills)), "shared": binary.metadata.shared}


def _from_ptxas(code: str) -> tuple[str, list[str]]:
    """Registers, and bytes of each kind of spill, as NVIDIA's assembler reports them."""
    import triton

    arch = re.findall(r"\.target (\w+)", code)[0]
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / ("ptxas-blackwell" if "sm_1" in arch else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(code)
        command = [str(tool), "-v", f"--gpu-name={arch}", str(ptx), "-o", str(ptx.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return re.findall(r"Used (\d+) registers", said)[0], re.findall(r"(\d+) bytes spill", said)


def host_synchronisations() -> dict[str, Any]:
    """Checks that loss and backward pass do not wait for the GPU; only reading the diagnostics does."""
    from verl_sspo.benchmark.losses import random_batch

    log_prob, old_log_prob, advantages, mask = random_batch(8, 4096, torch.device("cuda"))
    sspo_loss(log_prob, old_log_prob, advantages, mask, Gate())[0].backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        sspo_loss(log_prob, old_log_prob, advantages, mask, Gate())[0].backward()
        result, ok = "none", True
    except RuntimeError as raised:
        result, ok = str(raised), False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"check": "host synchronisations of the loss", "result": result, "ok": ok}


# The checks of one process. Triton's interpreter and compiler cannot share a process.
PARTS: dict[str, Callable[[bool], list[dict[str, Any]]]] = {
    "float32": lambda quick: [*exactness(torch.float32, "cpu", quick), nan_is_kept("cpu")],
    "bfloat16": partial(exactness, torch.bfloat16, "cpu"),
    "float16": partial(exactness, torch.float16, "cpu"),
    "compiled": compiled,
}


def in_processes(parts: Sequence[str], quick: bool) -> list[dict[str, Any]]:
    """Runs these parts in a process each, as many at a time as there are cores, and returns their rows."""

    def rows(part: str) -> list[dict[str, Any]]:
        command = [sys.executable, "-m", "verl_sspo.benchmark.gpu_check", "--part", part, *["--quick"] * quick]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if part != "compiled":
            # The interpreter uses numpy, which warns about every NaN.
            environment |= {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
        ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
        if ended.returncode:
            return [{"check": part, "result": f"ended with exit code {ended.returncode}", "ok": False}]
        return json.loads(ended.stdout.splitlines()[-1])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(itertools.chain.from_iterable(pool.map(rows, parts)))


def speed(seconds: float) -> Iterator[str]:
    """Tables of time and memory, compared with verl's losses and estimators."""
    if importlib.util.find_spec("verl") is None:
        yield "Speed is not measured: verl is not installed."
        return
    from verl_sspo.benchmark import advantages, losses

    for size in SIZES:
        yield from (section.as_markdown() for section in losses.measure([size], torch.device("cuda"), seconds))
    yield from (section.as_markdown() for section in advantages.measure((8192, 65536), 1024, seconds))


def log_prob_noise() -> Iterator[str]:
    """Tables of the noise of log-probs, for a model with random weights."""
    if importlib.util.find_spec("transformers") is None:
        yield "The noise of log-probs is not measured: transformers is not installed."
        return
    from verl_sspo.benchmark import noise

    for title, note, rows in noise.measure(*noise.random_model("cuda"), NOISE_LENGTHS):
        yield f"## {title}\n\n{note}\n\n{markdown(rows)}"


def markdown(rows: list[dict[str, Any]]) -> str:
    """A Markdown table, a column per key."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without-gpu", action="store_true", help="only the interpreter and the compiler")
    parser.add_argument("--quick", action="store_true", help="fewer lengths, dtypes and gates; no tables of speed")
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help="folder for the results on a GPU; default: %(default)s"
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.part:
        print(json.dumps(PARTS[arguments.part](arguments.quick)))
        return 0
    if importlib.util.find_spec("triton") is None:
        parser.error("Triton is not installed: pip install triton (it comes with PyTorch's CUDA builds)")
    if not arguments.without_gpu and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU: use --without-gpu")

    quick = arguments.quick
    if arguments.without_gpu:
        rows = in_processes(list(PARTS), quick)
    else:
        rows = [row for dtype in DTYPES for row in exactness(dtype, "cuda", quick)]
        rows += [nan_is_kept("cuda"), host_synchronisations(), *in_processes(["compiled"], quick)]
    for row in rows:
        row["ok"] = "ok" if row["ok"] else "FAILED"
        print(f"{row['ok']:8}{row['check']:36}{row['result']}")
    if not arguments.without_gpu:
        device = torch.cuda.get_device_name()
        arguments.output.mkdir(parents=True, exist_ok=True)
        tables: list[str] = []
        _write(arguments.output, device, rows, tables)
        for table in () if quick else itertools.chain(speed(seconds=10), log_prob_noise()):
            tables.append(table)
            _write(arguments.output, device, rows, tables)  # an early end keeps the results so far
    return int(any(row["ok"] != "ok" for row in rows))


def _write(folder: Path, device: str, rows: list[dict[str, Any]], tables: list[str]) -> None:
    (folder / "results.json").write_text(json.dumps({"device": device, "checks": rows}, indent=2) + "\n")
    page = "\n\n".join([f"# `verl-sspo gpu-check` on {device}", markdown(rows), *tables])
    (folder / "README.md").write_text(f"{page}\n")


if __name__ == "__main__":
    sys.exit(main())
