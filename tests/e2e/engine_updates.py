"""One rank of verl's actor: one update per setting, each from the same weights.

Started by test_engine_invariance.py, once per rank, with torch's RANK and WORLD_SIZE:
    python engine_updates.py FOLDER SETTING...
FOLDER holds `model/`, `rows.json` and `settings.json`. Rank 0 adds `<setting>.safetensors`, the parameters after the
update, and `<setting>.json`: verl's metrics, and the shapes (rows, tokens) of the micro-batches that went through the
model.
"""

import functools
import json
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from tensordict import TensorDict
from verl.trainer.ppo.padding_utils import construct_minimal_padding_template
from verl.utils import tensordict_utils as tu
from verl.workers.engine_workers import ActorRolloutRefWorker

from verl_sspo.compose import compose_config

RECIPES = Path(__file__).parents[2] / "recipes"


def batch_of(
    rows: list[dict], padding_rows: int, order: list[int], global_batch_size: int, rejecting: bool
) -> TensorDict:
    """The batch as verl's trainer passes it to the actor: jagged tensors, with verl's own padding rows."""
    samples = []
    for row in rows:
        input_ids = torch.tensor(row["prompt"] + row["response"])
        mask = torch.tensor(row["mask"])
        sample = {"prompts": torch.tensor(row["prompt"]), "responses": torch.tensor(row["response"])}
        sample |= {"response_mask": mask, "loss_mask": mask, "input_ids": input_ids}
        sample |= {"attention_mask": torch.ones_like(input_ids), "position_ids": torch.arange(len(input_ids))}
        samples.append(sample)
    template, _ = construct_minimal_padding_template(samples[0], {}, eos_token_id=0)
    padding = {name: template[name] for name in samples[0]}
    for sample, row in zip(samples, rows, strict=True):
        sample["old_log_probs"] = torch.tensor(row["old_log_probs"])
        sample["advantages"] = torch.full_like(sample["old_log_probs"], row["advantage"])
    # verl's padding rows have advantage 0. Here they have 1, so that only the mask excludes them.
    padding |= {"old_log_probs": torch.zeros(1), "advantages": torch.ones(1)}
    if rejecting:
        for sample, row in zip(samples, rows, strict=True):
            sample["rollout_is_weights"] = torch.tensor(row["weights"])
        padding |= {"rollout_is_weights": torch.ones(1)}
    samples += [padding] * padding_rows
    batch = tu.list_of_dict_to_tensordict([samples[i] for i in order])
    tu.assign_non_tensor(
        batch,
        calculate_entropy=False,
        distillation_use_topk=False,
        distillation_only=False,
        global_batch_size=global_batch_size,
        mini_batch_size=len(samples),
        epochs=1,
        seed=0,
        dataloader_kwargs={"shuffle": False},
        temperature=1.0,
    )
    return batch


@functools.cache
def recipe(algorithm: str) -> DictConfig:
    """The algorithm's recipe for a CPU."""
    return compose_config("ppo_trainer", [f"+algo={algorithm}", "+hardware=cpu"], RECIPES)


def update(config: DictConfig, batch: TensorDict) -> tuple[dict[str, torch.Tensor], dict]:
    """Parameters after one update of a new actor, and what it logged."""
    worker = ActorRolloutRefWorker(config=config.actor_rollout_ref, role="actor")
    worker.init_model()
    engine = worker.actor.engine

    shapes: list[list[int]] = []
    engine.module.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(list(kwargs["input_ids"].shape)), with_kwargs=True
    )
    # verl's dispatch gives each rank its chunk.
    chunk = tu.chunk_tensordict(batch, torch.distributed.get_world_size())[torch.distributed.get_rank()]
    metrics = tu.get(worker.update_actor(chunk), "metrics")
    # Every rank must read all parameters: FSDP gathers each one when it is read.
    parameters = {name: parameter.detach().clone() for name, parameter in engine.get_per_tensor_param()[0]}
    return parameters, {"metrics": metrics, "shapes": shapes}


def main() -> None:
    folder = Path(sys.argv[1])
    rows = json.loads((folder / "rows.json").read_text())
    settings = json.loads((folder / "settings.json").read_text())
    for name in sys.argv[2:]:
        setting = settings[name]
        batch = batch_of(
            rows, setting["padding_rows"], setting["order"], setting["global_batch_size"], setting["rejecting"]
        )
        overrides = OmegaConf.from_dotlist([f"actor_rollout_ref.model.path={folder / 'model'}", *setting["overrides"]])
        parameters, logged = update(OmegaConf.merge(recipe(setting["algorithm"]), overrides), batch)
        if torch.distributed.get_rank() == 0:
            save_file(parameters, folder / f"{name}.safetensors")
            (folder / f"{name}.json").write_text(json.dumps(logged))


if __name__ == "__main__":
    main()
