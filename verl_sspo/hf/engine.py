"""verl's FSDP engine for short responses: computes each prompt of a micro-batch once, and only the responses' logits.

verl computes a prompt once per response, the logits of every token, and log-probabilities of bfloat16 logits token by
token. With short responses and a large vocabulary this is most of the work. verl imports this module if
`actor_rollout_ref.model.external_lib` names it, as in recipes/hardware/cpu.yaml and gpu_hf.yaml.
"""

from typing import Any

import torch
from tensordict import TensorDict
from torch.nn.utils.rnn import pad_sequence
from verl.utils import tensordict_utils as tu
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

# verl's settings that need all logits or compute log-probabilities in another way, with verl's defaults.
OTHERS = {
    "use_remove_padding": True,
    "use_fused_kernels": False,
    "calculate_sum_pi_squared": False,
    "distillation_use_topk": False,
}
PROMPT, PADDING = 0, -1


# On a CPU verl looks up the engine for device "cuda" (see `verl_sspo.cpu.internals`) and vendor "cpu".
@EngineRegistry.register(
    model_type="language_model", backend=["fsdp", "fsdp2"], device="cuda", vendor=["cpu", "nvidia", "amd"]
)
class SharedPromptEngine(FSDPEngineWithLMHead):
    """verl's engine, except that log-probs and entropies of prompt tokens are 0. No loss or metric reads them."""

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        """One row per prompt: the prompt, then its responses, each of which sees only the prompt and itself."""
        inputs, output_args = super().prepare_model_inputs(micro_batch)
        is_text = inputs.keys() == {"input_ids", "attention_mask", "position_ids"} and inputs["input_ids"].dim() == 2
        others = any(tu.get_non_tensor_data(micro_batch, name, default) for name, default in OTHERS.items())
        config = self.model_config.hf_config
        layers = set(getattr(config, "layer_types", None) or ["full_attention"])
        # The mask below is for sdpa. Sliding windows and recurrent states would not respect it.
        if others or not is_text or config._attn_implementation != "sdpa" or layers != {"full_attention"}:
            return inputs, output_args

        ids, positions = (micro_batch[name].unbind() for name in ("input_ids", "position_ids"))
        lengths = [len(row) for row in micro_batch["prompts"].unbind()]
        prompts: dict[tuple[int, ...], list[int]] = {}
        for row, length in enumerate(lengths):
            prompts.setdefault(tuple(ids[row][:length].tolist()), []).append(row)

        device = ids[0].device
        columns: dict[str, list[torch.Tensor]] = {"input_ids": [], "position_ids": [], "parts": []}
        # For each response, in the order of the micro-batch: (prompt, place) of the logits of its tokens.
        logits_at: list[Any] = [None] * len(ids)
        for i, (prompt, rows) in enumerate(prompts.items()):
            length = end = len(prompt)
            parts = [torch.full((length,), PROMPT, device=device)]
            for part, row in enumerate(rows, PROMPT + 1):
                size = len(ids[row]) - length
                # The prompt's last token predicts the first of the response.
                places = torch.tensor([length - 1, *range(end, end + size - 1)][:size], device=device)
                logits_at[row] = torch.stack([torch.full_like(places, i), places])
                parts.append(torch.full((size,), part, device=device))
                end += size
            columns["parts"].append(torch.cat(parts))
            for name, values in (("input_ids", ids), ("position_ids", positions)):
                columns[name].append(torch.cat([values[rows[0]][:length], *(values[row][length:] for row in rows)]))

        # (prompts, tokens): 0 in the prompt, k in its k-th response.
        part_of = pad_sequence(columns["parts"], batch_first=True, padding_value=PADDING)
        width, first = part_of.shape[1], min(lengths) - 1
        visible = (part_of[:, None, :] == PROMPT) | (part_of[:, None, :] == part_of[:, :, None])
        visible &= torch.ones(width, width, dtype=torch.bool, device=device).tril()
        inputs = {name: pad_sequence(columns[name], batch_first=True) for name in ("input_ids", "position_ids")}
        output_args["logits_at"] = torch.cat(logits_at, dim=1) - torch.tensor([[0], [first]], device=device)
        output_args["prompt_lengths"] = torch.tensor(lengths, device=device)
        return inputs | {"attention_mask": visible[:, None], "logits_to_keep": width - first}, output_args

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict[str, torch.Tensor]:
        if "logits_at" not in output_args:
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        ids = micro_batch["input_ids"]
        offsets, responses = ids.offsets(), ids.offsets().diff() - output_args["prompt_lengths"]
        # For each response token: its row, and its place among all tokens.
        rows = torch.repeat_interleave(responses)
        ends = zip(offsets[1:].tolist(), responses.tolist(), strict=True)
        places = torch.cat([torch.arange(end - size, end, device=offsets.device) for end, size in ends])
        # (response tokens, vocabulary)
        logits = output.logits[tuple(output_args["logits_at"])].float() / output_args["temperature"][rows, None]
        log_probs = logits.log_softmax(dim=-1)

        def where_predicted(values: torch.Tensor) -> torch.Tensor:
            """Puts (response tokens,) into a nested tensor of all tokens, each at the token before it, as in verl."""
            tokens = values.new_zeros(len(ids.values())).index_put((places - 1,), values)
            return torch.nested.nested_tensor_from_jagged(tokens, offsets)

        outputs = {"log_probs": where_predicted(log_probs.gather(-1, ids.values()[places, None]).squeeze(-1))}
        if tu.get_non_tensor_data(micro_batch, "calculate_entropy", default=False):
            outputs["entropy"] = where_predicted(-(log_probs.exp() * log_probs).sum(dim=-1))
        return outputs
