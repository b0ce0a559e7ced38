"""The Triton kernel of the loss, without a GPU: `verl-sspo gpu-check`, and its settings."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from verl_sspo.algorithm.gates import Gate
from verl_sspo.algorithm.loss import runs_in_triton, sspo_loss
from verl_sspo.benchmark import gpu_check

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton (Linux, x86-64)")


@needs_triton
@pytest.mark.parametrize("quick", [pytest.param("--quick", id="quick"), pytest.param(None, marks=pytest.mark.slow)])
def test_exact_in_the_interpreter_and_compiled_without_spills(quick, capsys):
    assert gpu_check.main(["--without-gpu", *([quick] if quick else [])]) == 0
    shown = capsys.readouterr().out
    assert "FAILED" not in shown
    assert sum(line.startswith("ok ") for line in shown.splitlines()) >= 15


def test_a_bare_machine_has_what_the_check_imports():
    """A GPU machine with only torch, numpy and Triton, before anything else is installed."""
    code = """
import sys
for name in ("verl", "ray", "omegaconf", "hydra", "pandas", "tabulate", "pyarrow", "psutil", "transformers"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
from verl_sspo.cli import main
from verl_sspo.benchmark import gpu_check
assert not main(["gpu-check", "--part", "bfloat16", "--quick"])
assert "not installed" in next(gpu_check.speed(1)) + next(gpu_check.log_prob_noise())
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("fault", [0.5, torch.nan])
def test_a_kernel_that_is_wrong_is_seen(fault, monkeypatch):
    """`gpu_check.error` finds a sweep that is wrong in the gradient of one token."""

    def wrong(gate, log_prob, *others, **options):
        loss, diagnostics = sspo_loss(log_prob, gate=gate, **options)
        return (loss + fault * log_prob[0, 3] if options["kernel"] == "torch" else loss), diagnostics

    monkeypatch.setattr(gpu_check, "sspo_loss", lambda log_prob, gate, **o: wrong(gate, log_prob, **o))
    monkeypatch.setattr("verl_sspo.algorithm.loss.runs_in_triton", lambda *_: False)
    found = gpu_check.error(Gate(), gpu_check.batch(7, torch.float32, "cpu", weighted=True))
    assert not found <= gpu_check.TOLERANCE


def test_auto_is_triton_on_a_gpu_only_and_never_in_float64():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert runs_in_triton("auto", gpu, torch.float32) == (importlib.util.find_spec("triton") is not None)
    assert not runs_in_triton("auto", cpu, torch.float32)
    assert not runs_in_triton("auto", gpu, torch.float64)
    assert not runs_in_triton("torch", gpu, torch.float32)
    assert runs_in_triton("triton", cpu, torch.float32)
    with pytest.raises(ValueError, match="kernel='torch'"):
        runs_in_triton("triton", gpu, torch.float64)


@needs_triton
def test_a_kernel_that_cannot_run_names_the_way_around():
    """Without the interpreter Triton has no driver on a CPU."""
    zeros = torch.zeros(1, 2)
    with pytest.raises(RuntimeError, match=r"policy_loss\.kernel=torch"):
        sspo_loss(zeros, zeros, zeros, torch.ones(1, 2), Gate(), kernel="triton")


@needs_triton
def test_a_kernel_that_differs_from_pytorch_ends_the_run_at_its_first_micro_batch(monkeypatch):
    log_prob, old, advantages = torch.randn(3, 2, 5).mul(0.1).unbind()
    mask = torch.ones(2, 5, dtype=torch.bool)
    from verl_sspo.algorithm import kernel, loss

    monkeypatch.setattr(loss, "_compared", set())
    expected, _ = sspo_loss(log_prob, old, advantages, mask, Gate(), kernel="torch")

    def broken(error):
        def sweep(gate, response_mask, **inputs):
            gradient, sums = loss.sweep(gate, response_mask, torch.float32, **inputs)
            return gradient + error * (torch.arange(5) == 3), sums

        return sweep

    monkeypatch.setattr(kernel, "sweep", broken(0.05))
    with pytest.raises(RuntimeError, match=r"gpu-check.*policy_loss\.kernel=torch"):
        sspo_loss(log_prob, old, advantages, mask, Gate(), kernel="triton")
    monkeypatch.setattr(kernel, "sweep", broken(1e-6))
    assert sspo_loss(log_prob, old, advantages, mask, Gate(), kernel="triton")[0] == pytest.approx(float(expected))
    # Only the first micro-batch is compared: later ones are not computed twice.
    monkeypatch.setattr(loss, "sweep", None)
    monkeypatch.setattr(kernel, "sweep", lambda gate, mask, **inputs: (torch.zeros(2, 5), torch.zeros(2, kernel.COUNT)))
    assert sspo_loss(log_prob, old, advantages, mask, Gate(), kernel="triton")[0] == 0


@needs_triton
def test_the_setting_reaches_the_loss_and_the_log(monkeypatch, capsys):
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    from verl_sspo.algorithm import registration
    from verl_sspo.analysis.objectives import actor_config, with_policy_loss

    monkeypatch.setattr(registration, "_announced", False)
    zeros, config = torch.zeros(1, 2), actor_config(["algo=sspo"])
    batch = {"old_log_prob": zeros, "log_prob": zeros, "advantages": zeros, "response_mask": torch.ones(1, 2)}
    get_policy_loss_fn("sspo")(**batch, config=config)
    assert "loss in      PyTorch" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match=r"policy_loss\.kernel=torch"):
        get_policy_loss_fn("sspo")(**batch, config=with_policy_loss(config, kernel="triton"))
