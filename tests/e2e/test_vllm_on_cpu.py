"""The quickstart with verl's own vLLM rollout, on vLLM's CPU build: the weights and their updates reach it."""

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
    # vLLM's own environment takes minutes to install. CI runs without it, the scheduled job makes it.
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(
        not PYTHON.exists(),
        reason=f"{PYTHON} is missing: scripts/setup_cpu_vllm.sh makes it, on x86-64 Linux (or set VERL_SSPO_VLLM_VENV)",
    ),
]


def probabilities(model_path: Path, texts: list[str]) -> torch.Tensor:
    """Probabilities of all next tokens after each token of the texts, concatenated."""
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
        # A large rate: a rollout with the weights from before the two updates would not agree with the actor.
        "actor_rollout_ref.actor.optim.lr=1e-3",
        # Save the actor after the first step in the format of transformers.
        "trainer.save_freq=1",
        "actor_rollout_ref.actor.checkpoint.save_contents=[hf_model]",
        # Validate once, after the last update.
        "trainer.val_before_train=false",
        "trainer.test_freq=2",
        "data.val_max_samples=32",
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2800)
    assert ended.returncode == 0, ended.stderr
    # Ray prefixes lines with the actor's class: verl's server generated the responses.
    assert "vLLMHttpServer" in (run / "train.log").read_text()

    steps = {
        entry["step"]: entry["data"] for entry in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    }
    # vLLM starts from random weights. At step 1 it agrees with the actor because it got the actor's weights.
    assert steps[1]["training/rollout_probs_diff_max"] < 1e-4
    # At step 2 it agrees because it got the weights after the updates of step 1: the old ones would not agree.
    assert steps[2]["training/rollout_probs_diff_max"] < 1e-4
    texts = [prompt[0]["content"] for prompt in pd.read_parquet(task / "val.parquet")["prompt"][:32]]
    updated = run / "checkpoints" / "global_step_1" / "actor" / "huggingface"
    change = (probabilities(updated, texts) - probabilities(task / "model", texts)).abs().max()
    assert change > 1e-2
