"""The quickstart with verl's own vLLM rollout, on the CPU build of vLLM: weights reach it, and so do their updates."""

import json
import os
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("VERL_SSPO_VLLM_VENV", ROOT / ".venv-vllm")) / "bin" / "python"

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.vllm,
    # An environment of its own takes minutes to install: CI does without, the scheduled job makes it.
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(
        not PYTHON.exists(),
        reason=f"{PYTHON} is missing: scripts/setup_cpu_vllm.sh makes it, on x86-64 Linux (or set VERL_SSPO_VLLM_VENV)",
    ),
]


def probabilities(model_path: Path, texts: list[str]) -> torch.Tensor:
    """Those of every next token after every token of the texts, in a row."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_path), AutoTokenizer.from_pretrained(model_path)
    with torch.no_grad():
        return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1) for text in texts])


def test_verls_vllm_rollout_follows_the_trainer(tmp_path):
    run, task = tmp_path / "run", tmp_path / "arithmetic" / "digits2-seed0"
    command = [
        *(str(PYTHON), "-m", "verl_sspo", "quickstart", f"--run-dir={run}", f"task.folder={task}", "hardware=cpu_vllm"),
        "task.digits=2",
        "task.heads=2",
        "trainer.total_training_steps=2",
        "data.train_batch_size=8",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.rollout.n=4",
        # Two updates that a rollout with the weights from before them would not agree with.
        "actor_rollout_ref.actor.optim.lr=1e-3",
        # The actor after the first step, as transformers reads it.
        "trainer.save_freq=1",
        "actor_rollout_ref.actor.checkpoint.save_contents=[hf_model]",
        # Once, after the last update.
        "trainer.val_before_train=false",
        "trainer.test_freq=2",
        "data.val_max_samples=32",
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2800)
    assert ended.returncode == 0, ended.stderr
    # Ray prefixes lines with the actor's class: it was verl's server that generated.
    assert "vLLMHttpServer" in (run / "train.log").read_text()

    steps = {
        entry["step"]: entry["data"] for entry in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    }
    # vLLM starts from random weights: at step 1 it agrees with the actor because it got the actor's.
    assert steps[1]["training/rollout_probs_diff_max"] < 1e-4
    # And at step 2 because it got those after the updates of step 1, with which the old ones do not agree.
    assert steps[2]["training/rollout_probs_diff_max"] < 1e-4
    texts = [prompt[0]["content"] for prompt in pd.read_parquet(task / "val.parquet")["prompt"][:32]]
    updated = run / "checkpoints" / "global_step_1" / "actor" / "huggingface"
    change = (probabilities(updated, texts) - probabilities(task / "model", texts)).abs().max()
    assert change > 1e-2
