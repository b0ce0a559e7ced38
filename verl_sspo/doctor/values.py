"""Whether every value of a configuration is of the kind that verl has there, so that one can compute with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from verl_sspo.doctor.finding import Finding
from verl_sspo.run.compose import reference_config

#: What batches, lengths and groups of GPUs are computed from; the sizes of Megatron where there are any.
SIZES = (
    "data.train_batch_size",
    "data.max_prompt_length",
    "data.max_response_length",
    "trainer.nnodes",
    "trainer.n_gpus_per_node",
    "actor_rollout_ref.actor.ppo_mini_batch_size",
    "actor_rollout_ref.actor.ppo_epochs",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
    "actor_rollout_ref.actor.ulysses_sequence_parallel_size",
    "actor_rollout_ref.actor.megatron.tensor_model_parallel_size",
    "actor_rollout_ref.actor.megatron.pipeline_model_parallel_size",
    "actor_rollout_ref.actor.megatron.context_parallel_size",
    "actor_rollout_ref.actor.megatron.expert_model_parallel_size",
    "actor_rollout_ref.rollout.n",
    "actor_rollout_ref.rollout.val_kwargs.n",
    "actor_rollout_ref.rollout.tensor_model_parallel_size",
    "actor_rollout_ref.rollout.data_parallel_size",
    "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu",
)


def value_findings(config: DictConfig) -> list[Finding]:
    """Errors only, each with the key that it is about; without any, the other checks can compute.

    Args:
        config: as `verl_sspo.run.compose.compose_config` returns it.
    """
    try:
        values: Any = OmegaConf.to_container(config, resolve=True)
    except Exception as error:  # verl resolves all of it inside a Ray actor, where this would be hard to read
        return [Finding("error", "interpolation", str(error).splitlines()[0], "correct the reference it names")]
    try:
        reference = reference_config(str(config.get("model_engine")))
    except HydraException:
        engine = values.get("model_engine")
        return [_wrong("model_engine", engine, "must be one of verl's", "set model_engine=dp or model_engine=megatron")]
    known: Any = OmegaConf.to_container(reference, resolve=True)
    return [*_kinds(values, known, ""), *_sizes(values, known)]


def _wrong(path: str, value: Any, must: str, remedy: str = "correct it") -> Finding:
    return Finding("error", "value", f"{path}={value!r} {must}", remedy)


def _kinds(values: dict[str, Any], known: dict[str, Any], prefix: str) -> Iterator[Finding]:
    for key, example in known.items():
        path = f"{prefix}{key}"
        if key not in values:
            yield Finding("error", "value", f"{path} is missing, and verl reads it", "leave it in")
            continue
        value = values[key]
        if isinstance(example, dict) and example:
            if isinstance(value, dict):
                yield from _kinds(value, example, f"{path}.")
            else:
                yield _wrong(path, value, "must be a section")
        elif value is None:
            continue  # many keys may be null
        elif isinstance(example, bool):
            if not isinstance(value, bool):
                yield _wrong(path, value, "must be true or false")
        elif isinstance(example, int | float) and (isinstance(value, bool) or not isinstance(value, int | float)):
            yield _wrong(path, value, "must be a number")


def _sizes(values: dict[str, Any], known: dict[str, Any]) -> Iterator[Finding]:
    for path in SIZES:
        value: Any = values
        example: Any = known
        for key in path.split("."):
            if key not in example or not isinstance(value, dict) or key not in value:
                break  # of the other engine, or said already
            value, example = value[key], example[key]
        else:
            counts = isinstance(value, int) and value >= 1
            if not counts and not isinstance(value, bool | str | list | dict):  # these are no numbers: said already
                yield _wrong(path, value, "must be a whole number of at least 1")
