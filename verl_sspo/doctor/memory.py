"""Estimates the memory that the rollout `hf` and its trainer need on one GPU (recipes/hardware/gpu_hf.yaml).

Bytes follow from parameters, dtypes and the largest batches. A micro-batch was measured with PyTorch's profiler on a
CPU, with small Qwen2 models and gradient checkpointing. Per token, the current layer takes 24 bytes per hidden unit, 11
per unit of the MLP and 3 per token in the attention mask; the logits take `LOGITS` bytes per vocabulary entry.
"""

from collections.abc import Iterator
from typing import Any

import torch
from omegaconf import DictConfig
from transformers import AutoConfig, AutoModelForCausalLM
from verl.utils.torch_dtypes import PrecisionType

from verl_sspo.doctor.finding import Finding, error, ok
from verl_sspo.doctor.rules import ACTOR, ROLLOUT, Facts

#: Bytes per token and vocabulary entry, in verl_sspo.hf.engine: for an update, for an update that also computes the
#: entropy, and for log-probs with entropy but without gradients.
LOGITS = {"update": 12, "update with entropy": 20, "log-probs": 18}
#: Bytes per response and vocabulary entry for sampling a token.
SAMPLING = 22
#: Bytes of the CUDA contexts of trainer and rollout: an allowance of ours, not measured.
CONTEXTS = 2**30
#: How to reduce the memory of each phase.
REMEDIES = {
    "update": f"lower {ACTOR}.ppo_max_token_len_per_gpu, or set {ACTOR}.fsdp_config.offload_policy=true",
    "log-probs": f"lower {ROLLOUT}.log_prob_max_token_len_per_gpu",
    "rollout": f"lower {ROLLOUT}.max_num_seqs",
}


def card_memory(config: DictConfig, model: Any) -> dict[str, dict[str, float]]:
    """Bytes on one GPU, by phase of a step and by part.

    Args:
        config: configuration of main_ppo.
        model: Hugging Face configuration of the model.
    """
    facts, text = Facts(config), model.get_text_config()
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(model).parameters())
    size = PrecisionType.to_dtype(facts.rollout.dtype).itemsize
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    responses = facts.data.train_batch_size * facts.rollout.n // facts.ranks
    running = min(responses, facts.rollout.max_num_seqs)

    def tokens(section: DictConfig, name: str, most: int) -> int:
        if facts.actor.use_dynamic_bsz:
            return min(section[f"{name}_max_token_len_per_gpu"], most * facts.longest)
        return section[f"{name}_micro_batch_size_per_gpu"] * facts.longest

    update = tokens(facts.actor, "ppo", facts.mini_batch // facts.ranks)
    forward = tokens(facts.rollout, "log_prob", responses)
    cached = 2 * size * text.num_hidden_layers * text.num_key_value_heads * head  # keys and values of a token
    # A prompt and its responses are one row.
    row = facts.data.max_prompt_length + facts.rollout.n * facts.data.max_response_length

    def layer(count: int) -> int:
        return count * (24 * text.hidden_size + 11 * text.intermediate_size + 3 * min(count, row))

    entropy = " with entropy" if facts.actor.entropy_coeff or facts.actor.calculate_entropy else ""
    checkpoints = 2 * text.hidden_size * text.num_hidden_layers * update
    return {
        "update": {
            "model, gradients and Adam": 16 * parameters / facts.ranks,
            "activations": checkpoints + layer(update),
            "logits": LOGITS[f"update{entropy}"] * update * text.vocab_size,
        },
        "log-probs": {
            "model": 4 * parameters / facts.ranks,
            "activations": layer(forward),
            "logits": LOGITS["log-probs"] * forward * text.vocab_size,
        },
        "rollout": {
            "model": size * parameters,
            "keys and values": cached * facts.longest * running,
            "sampling": SAMPLING * running * text.vocab_size,
        },
    }


def memory_findings(config: DictConfig, settings: dict[str, Any]) -> Iterator[Finding]:
    """Checks that the visible GPU is large enough if trainer and rollout `hf` take turns on it.

    Args:
        settings: content of the model's config.json.
    """
    if config.actor_rollout_ref.rollout.get("name") != "hf" or config.trainer.device == "cpu":
        return
    try:
        model = AutoConfig.for_model(**settings)
    except (KeyError, ValueError, TypeError):
        return  # a model with its own code
    phases = card_memory(config, model)
    needed = {phase: sum(parts.values()) + CONTEXTS for phase, parts in phases.items()}
    largest = max(needed, key=lambda phase: needed[phase])
    parts = ", ".join(f"{part} {size / 2**30:.1f}" for part, size in phases[largest].items())
    others = ", ".join(f"{phase} {size / 2**30:.1f}" for phase, size in needed.items() if phase != largest)
    message = f"estimated {needed[largest] / 2**30:.1f} GiB of GPU memory in the {largest} ({parts}); {others}"
    if torch.cuda.is_available() and (there := torch.cuda.get_device_properties(0).total_memory) < needed[largest]:
        yield error("memory", f"{message}; the GPU has {there / 2**30:.1f}", REMEDIES[largest])
    else:
        yield ok("memory", message)
