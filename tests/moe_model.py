"""A tiny mixture of experts with random weights, for unit and end-to-end tests."""

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from verl_sspo.quickstart.model import create_tokenizer


def create_moe_model(seed: int) -> Qwen3MoeForCausalLM:
    """A Qwen3-MoE with 2 layers of 4 experts, 2 of them per token, and the quickstart's vocabulary."""
    torch.manual_seed(seed)
    tokenizer = create_tokenizer()
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        # Large weights: routing is far from ties, and probabilities are far from uniform.
        initializer_range=0.2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3MoeForCausalLM(config)
