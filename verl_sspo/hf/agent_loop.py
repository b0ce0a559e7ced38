"""verl's agent loop for single-turn text, with one pass of work per prompt instead of per response.

verl makes an agent loop, a request, a grader call and a put into TransferQueue for each response. With a small model
this costs more than the model itself. Here, all responses to a prompt share one of each. To use it, set
`actor_rollout_ref.rollout.agent.agent_loop_manager_class`, as recipes/hardware/cpu.yaml does.
"""

import copy
import logging
import random
import time
from typing import Any
from uuid import uuid4

import hydra
import numpy as np
import ray
import torch
import transfer_queue as tq
from torch.nn.utils.rnn import pad_sequence
from verl.experimental.agent_loop.agent_loop import (
    AgentLoopMetrics,
    AgentLoopOutput,
    DictConfigWrap,
    ToolListWrap,
    _agent_loop_registry,
)
from verl.protocol import DataProto
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.rollout.llm_server import LLMServerClient

logger = logging.getLogger(__name__)


class GroupAgentLoopWorker(AgentLoopWorkerTQ.__ray_actor_class__):  # type: ignore[name-defined,misc]
    """Handles single-turn text from the rollout `hf`, graded during the rollout. verl's own worker does the rest."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._groups_are_possible = (
            self.rollout_config.name == "hf"
            # Partial rollouts need verl's own loop, which continues each response separately.
            and type(self.llm_client) is LLMServerClient
            and self.processor is None
            and not self.distillation_enabled
            and self.reward_loop_worker_handles is not None
        )
        self._agent_loop = hydra.utils.instantiate(
            _agent_loop_registry["single_turn_agent"],
            trainer_config=DictConfigWrap(self.config),
            server_manager=self.llm_client,
            tokenizer=self.tokenizer,
            processor=self.processor,
            hf_model_type=self.hf_model_type,
            dataset_cls=self.dataset_cls,
            data_config=DictConfigWrap(self.config.data),
            tools=ToolListWrap(self.tools),
        )

    async def _run_prompt(self, prompt: dict, sampling_params: dict, trajectory: dict, trace: bool = False) -> None:
        is_plain = prompt["agent_name"] == "single_turn_agent" and "__do_sample__" not in prompt
        if not (self._groups_are_possible and is_plain):
            return await super()._run_prompt(prompt, sampling_params, trajectory, trace)
        uid, partition_id = prompt["uid"], "val" if trajectory["validate"] else "train"
        fields = {name: value for name, value in prompt.items() if name not in ("agent_name", "__rollout_n__")}
        config = self.rollout_config.val_kwargs if trajectory["validate"] else self.rollout_config
        await tq.async_kv_put(key=uid, partition_id=partition_id, tag={"status": "running"})
        try:
            outputs = await self._generate(fields, sampling_params, prompt.get("__rollout_n__", config.n))
            await self._grade(outputs, fields)
            await self._store(outputs, fields, partition_id)
            status = "finished"
        except Exception:  # as in verl's own worker: logged, and the prompt is marked as failed
            logger.exception(f"the rollout of the prompt {uid} failed")
            status = "failure"
        await tq.async_kv_put(key=uid, partition_id=partition_id, tag={"status": status})

    async def _generate(self, fields: dict, sampling_params: dict, n: int) -> list[AgentLoopOutput]:
        prompt_ids = await self._agent_loop.ct_build_initial_tokens(list(fields["raw_prompt"]))
        start = time.perf_counter()
        group = await self.llm_client.generate(uuid4().hex, prompt_ids=prompt_ids, sampling_params=sampling_params, n=n)
        seconds, version = time.perf_counter() - start, group.extra_fields["global_steps"]
        limit = self.rollout_config.response_length
        return [
            AgentLoopOutput(
                prompt_ids=prompt_ids,
                response_ids=response.token_ids[:limit],
                response_mask=[1] * len(response.token_ids[:limit]),
                response_logprobs=response.log_probs[:limit],
                multi_modal_data={},
                num_turns=2,
                metrics=AgentLoopMetrics(generate_sequences=seconds),
                extra_fields=dict.fromkeys(("global_steps", "min_global_steps", "max_global_steps"), version)
                | {"turn_scores": [], "tool_rewards": []},
            )
            for response in group.extra_fields["responses"]
        ]

    async def _grade(self, outputs: list[AgentLoopOutput], fields: dict) -> None:
        """Sets the rewards, with one call to a grader process."""
        columns: dict[str, list] = {name: [copy.copy(value) for _ in outputs] for name, value in fields.items()}
        columns |= {"__num_turns__": [2] * len(outputs), "tool_extra_fields": [o.extra_fields for o in outputs]}
        arrays = {name: np.empty(len(outputs), dtype=object) for name in columns}
        for name, values in columns.items():
            arrays[name][:] = values
        responses = [torch.tensor(output.response_ids) for output in outputs]
        batch = {
            "prompts": torch.tensor([output.prompt_ids for output in outputs]),
            "responses": pad_sequence(responses, batch_first=True),
            "attention_mask": pad_sequence(
                [torch.ones(len(output.prompt_ids + output.response_ids), dtype=torch.long) for output in outputs],
                batch_first=True,
            ),
        }
        data = DataProto.from_dict(batch, non_tensors=arrays)
        results = await random.choice(self.reward_loop_worker_handles).compute_score_batch.remote(data)
        for output, result in zip(outputs, results, strict=True):
            output.reward_score = result["reward_score"]
            output.extra_fields["reward_extra_info"] = result["reward_extra_info"]

    async def _store(self, outputs: list[AgentLoopOutput], fields: dict, partition_id: str) -> None:
        """Puts the group into TransferQueue, as verl's `_agent_loop_postprocess` does for each response."""
        rows, tags = [], []
        for output in outputs:
            row = {**output.as_dict(), **fields, "multi_modal_inputs": {}}
            row.pop("multi_modal_data")
            row["loss_mask"] = row["response_mask"]
            row["input_ids"] = torch.cat([row["prompts"], row["responses"]])
            row["position_ids"] = torch.arange(len(row["input_ids"]))
            rows.append(row)
            lengths = {"prompt_len": len(row["prompts"]), "response_len": len(row["responses"])}
            versions = {name: output.extra_fields[name] for name in ("min_global_steps", "max_global_steps")}
            tag = {"status": "success", "seq_len": len(row["input_ids"]), "global_steps": fields["global_steps"]}
            tags.append(tag | lengths | versions)
        keys = [f"{fields['uid']}_{session_id}_0" for session_id in range(len(outputs))]
        await tq.async_kv_batch_put(
            keys=keys, fields=list_of_dict_to_tensordict(rows), tags=tags, partition_id=partition_id
        )


class GroupAgentLoopManager(AgentLoopManagerTQ):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(GroupAgentLoopWorker)
