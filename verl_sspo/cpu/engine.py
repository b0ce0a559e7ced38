"""verl's FSDP engine on a CPU: logits of the responses alone, in float32 where probabilities are computed.

verl computes the logits of every token, prompts too, and turns those in bfloat16 into log-probabilities token by token.
With a large vocabulary and short responses this takes longer than the model itself. verl imports this module where
`actor_rollout_ref.model.external_lib` names it; recipes/hardware/cpu.yaml does.
"""

from typing import Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

# verl's settings that need the logits of all tokens or have their own way to log-probabilities, and verl's defaults.
OTHERS = {
    "use_remove_padding": True,
    "use_fused_kernels": False,
    "calculate_sum_pi_squared": False,
    "distillation_use_topk": False,
}


# verl looks the engine up as the CUDA one (`verl_sspo.cpu.internals`), of this vendor.
@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cuda", vendor="cpu")
class ResponseEngine(FSDPEngineWithLMHead):
    """verl's engine, whose log-probs and entropies of prompt tokens are 0: no loss and no metric reads them."""

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        inputs, output_args = super().prepare_model_inputs(micro_batch)
        if not any(tu.get_non_tensor_data(micro_batch, name, default) for name, default in OTHERS.items()):
            lengths, responses = (micro_batch[name].offsets().diff() for name in ("input_ids", "responses"))
            # (rows, tokens): whether the logits there are those of a response's token, which is the next one.
            predicts = torch.arange(int(lengths.max())).expand(len(lengths), -1)
            predicts = (predicts >= (lengths - responses - 1)[:, None]) & (predicts < (lengths - 1)[:, None])
            output_args["predicts"] = predicts
            inputs["logits_to_keep"] = predicts.shape[1] - int((lengths - responses).min()) + 1
        return inputs, output_args

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict[str, torch.Tensor]:
        if "predicts" not in output_args:
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        predicts, input_ids = output_args["predicts"], micro_batch["input_ids"]
        offsets = input_ids.offsets()
        rows, columns = predicts.nonzero(as_tuple=True)
        # (response tokens, vocabulary) and (response tokens,).
        logits = output.logits[rows, columns - predicts.shape[1]].float()
        log_probs = (logits / output_args["temperature"][rows, None]).log_softmax(dim=-1)
        places = offsets[rows] + columns
        labels = input_ids.values()[places + 1]

        def everywhere(values: torch.Tensor) -> torch.Tensor:
            """(response tokens,) as a nested tensor of all tokens."""
            tokens = values.new_zeros(input_ids.values().shape[0]).index_put((places,), values)
            return torch.nested.nested_tensor_from_jagged(tokens, offsets)

        outputs = {"log_probs": everywhere(log_probs.gather(-1, labels[:, None]).squeeze(-1))}
        if tu.get_non_tensor_data(micro_batch, "calculate_entropy", default=False):
            outputs["entropy"] = everywhere(-(log_probs.exp() * log_probs).sum(dim=-1))
        return outputs
