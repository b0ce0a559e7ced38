"""Checks of a composed configuration. They read nothing but it; no GPU, no model, no data."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import typing
import warnings
from collections.abc import Iterator
from typing import Any, cast

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from verl_sspo.doctor.actor import actor_findings
from verl_sspo.doctor.finding import Finding
from verl_sspo.doctor.values import value_findings
from verl_sspo.run.compose import reference_config

GROUP_ESTIMATORS = ("sspo", "grpo", "grpo_vectorized", "rloo", "rloo_vectorized", "opo", "grpo_passk")
#: Sections that verl hands on without a schema, or that this package reads.
OPEN_SECTIONS = (
    "algorithm.sspo",
    "reward.custom_reward_function.reward_kwargs",
    "reward.reward_kwargs",
    "ray_kwargs.ray_init",
)
#: Top-level sections of older verls: verl 0.9 composes them and does not read them.
LEGACY_SECTIONS = ("custom_reward_function", "reward_model", "sandbox_fusion")


def configuration_findings(config: DictConfig) -> list[Finding]:
    """Everything that a composed configuration of main_ppo reveals about itself.

    Args:
        config: as `verl_sspo.run.compose.compose_config` returns it, or as main_ppo receives it.
    """
    if wrong := value_findings(config):
        return wrong
    checks = (
        _legacy_keys,
        _classes,
        _ignored_keys,
        _conversion,
        _registered,
        _off_policy,
        _batch_sizes,
        _micro_batches,
        _parallelism,
        _separate_rollout,
        _sampling,
        _rewards_and_seeds,
        _workers,
        _weight_transfer,
    )
    findings = [finding for check in checks for finding in check(config)]
    return [*findings, *actor_findings(config.actor_rollout_ref.actor)]


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, child in node.items():
            yield from _leaves(child, f"{path}.{key}")
    else:
        yield path, node


def _legacy_keys(config: DictConfig) -> Iterator[Finding]:
    sections = _as_written(config)
    for section in LEGACY_SECTIONS:
        for path, value in _leaves(sections.get(section, {}), section):
            if value is not None:
                new = path.replace("reward_model.reward_manager", "reward_manager.name")
                yield Finding(
                    "error", "legacy", f"verl 0.9 composes {path} and does not read it", f"set it as reward.{new}"
                )


def _classes(config: DictConfig) -> Iterator[Finding]:
    """Whether every `_target_` is there: verl imports most of them in its workers, after the GPUs are taken."""
    for path, _ in _leaves(_as_written(config), ""):
        if path.endswith("._target_"):
            path = path.removeprefix(".")
            try:
                get_class(str(OmegaConf.select(config, path)))
            except (ImportError, ValueError) as error:
                yield Finding("error", "class", f"{path} names no class: {error}", "correct the name, or install it")


def _ignored_keys(config: DictConfig) -> Iterator[Finding]:
    text = OmegaConf.to_yaml(config, resolve=False)
    for path in _unknown_keys(_as_written(config), _as_written(reference_config(config.model_engine)), ""):
        if f"${{{path}." in text or f"${{{path}}}" in text:
            continue  # a section of the recipe's own that other keys refer to
        if path.startswith("data.") and config.data.custom_cls.path:
            continue  # a data set class of the user's may read anything
        yield Finding(
            "error",
            "unknown_key",
            f"verl does not know {path}: it would be ignored, or stop a worker after the GPUs are taken",
            "check the spelling and the section, or remove it",
        )


def _as_written(config: DictConfig) -> dict[str, Any]:
    """As plain data, interpolations as text."""
    return cast("dict[str, Any]", OmegaConf.to_container(config, resolve=False))


def _unknown_keys(node: dict[str, Any], known: dict[str, Any], path: str) -> Iterator[str]:
    try:
        types = _field_types(str(node["_target_"])) if "_target_" in node else {}
    except (ImportError, ValueError):
        return  # nobody can know its keys: `_classes` says so
    for key, child in node.items():
        here = f"{path}{key}"
        if here in OPEN_SECTIONS or _is_free_form(types.get(key)):
            continue
        if key not in known:
            if key not in types:
                yield here
        elif isinstance(child, dict) and isinstance(known[key], dict) and known[key]:
            yield from _unknown_keys(child, known[key], f"{here}.")


def _field_types(target: str) -> dict[str, Any]:
    """Fields of the dataclass that verl makes of a section."""
    cls = get_class(target)
    return typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}


def _is_free_form(kind: Any) -> bool:
    return kind is dict or typing.get_origin(kind) is dict


def _conversion(config: DictConfig) -> Iterator[Finding]:
    """What the driver and the workers do first: sections into dataclasses, then verl's own validation."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    actor_rollout_ref = config.actor_rollout_ref
    rollout = actor_rollout_ref.rollout
    sections = (actor_rollout_ref.actor, rollout, rollout.checkpoint_engine)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for section in sections:
                omega_conf_to_dataclass(section)
            validate_config(config, need_reference_policy(config), need_critic(config))
        except Exception as error:
            yield Finding("error", "verl", f"verl rejects the configuration: {error}", "correct what it names")


def _registered(config: DictConfig) -> Iterator[Finding]:
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY

    loss_mode = config.actor_rollout_ref.actor.policy_loss.loss_mode
    for kind, name, registry in (
        ("policy loss", loss_mode, POLICY_LOSS_REGISTRY),
        ("advantage estimator", config.algorithm.adv_estimator, ADV_ESTIMATOR_REGISTRY),
    ):
        if str(name) not in registry:
            remedy = f"known: {', '.join(sorted(str(getattr(key, 'value', key)) for key in registry))}"
            yield Finding("error", "registered", f"verl knows no {kind} {name!r}", remedy)


def _off_policy(config: DictConfig) -> Iterator[Finding]:
    actor, data = config.actor_rollout_ref.actor, config.data
    bypass = config.algorithm.get("rollout_correction", {}).get("bypass_mode", False)
    gated = actor.policy_loss.loss_mode in ("sspo", "gspo", "sapo", "geo_mean", "vanilla")
    if gated and not bypass and actor.ppo_epochs == 1 and data.train_batch_size <= actor.ppo_mini_batch_size:
        yield Finding(
            "warning",
            "on_policy",
            f"one update per rollout (train_batch_size={data.train_batch_size} <= ppo_mini_batch_size="
            f"{actor.ppo_mini_batch_size}, ppo_epochs=1): every ratio is 1, so SSPO, GRPO, GSPO and SAPO are the same",
            "set actor_rollout_ref.actor.ppo_mini_batch_size to a quarter of data.train_batch_size, say",
        )
    if bypass and actor.policy_loss.loss_mode == "sspo":
        yield Finding(
            "warning",
            "bypass_mode",
            "rollout_correction.bypass_mode=true takes the rollout's log-probs as the old ones, so the gates also act "
            "on its lag and on the difference between its engine and the actor"
            + ("" if actor.calculate_entropy else "; the entropy is not logged"),
            "unless that is meant, set algorithm.rollout_correction.bypass_mode=false; for the entropy, as "
            "actor/entropy_loss, set actor_rollout_ref.actor.calculate_entropy=true",
        )
    if config.algorithm.use_kl_in_reward and actor.policy_loss.loss_mode == "sspo":
        yield Finding(
            "warning",
            "kl",
            "use_kl_in_reward=true puts a KL term into the reward that SSPO's objective does not have",
            "set algorithm.use_kl_in_reward=false",
        )


def _data_parallel_size(config: DictConfig) -> int:
    world = trainer_gpus(config)
    actor = config.actor_rollout_ref.actor
    if actor.strategy == "megatron" and (megatron := actor.get("megatron")):
        return world // (
            megatron.tensor_model_parallel_size * megatron.pipeline_model_parallel_size * megatron.context_parallel_size
        )
    return world // max(actor.get("ulysses_sequence_parallel_size", 1), 1)


def _batch_sizes(config: DictConfig) -> Iterator[Finding]:
    actor, rollout, data = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.data
    ranks = max(_data_parallel_size(config), 1)
    mini_batch = actor.ppo_mini_batch_size * rollout.n
    if data.train_batch_size % min(actor.ppo_mini_batch_size, data.train_batch_size):
        yield Finding(
            "error",
            "batch_size",
            f"data.train_batch_size={data.train_batch_size} is no multiple of ppo_mini_batch_size="
            f"{actor.ppo_mini_batch_size}: verl fills the last mini-batch with empty rows",
            "make one a multiple of the other",
        )
    if mini_batch % ranks:
        yield Finding(
            "error",
            "batch_size",
            f"a mini-batch of {actor.ppo_mini_batch_size} prompts x {rollout.n} responses does not divide by {ranks} "
            "data-parallel ranks",
            "change actor_rollout_ref.actor.ppo_mini_batch_size or actor_rollout_ref.rollout.n",
        )
    if rollout.n == 1 and config.algorithm.adv_estimator in GROUP_ESTIMATORS:
        yield Finding(
            "warning",
            "group_size",
            "rollout.n=1 leaves a group of one response: no baseline, the advantage is the reward",
            "set actor_rollout_ref.rollout.n=8, say",
        )
    if not actor.use_dynamic_bsz and not mini_batch % ranks:
        for name, micro, of, size in (
            ("actor.ppo_micro_batch_size_per_gpu", actor.ppo_micro_batch_size_per_gpu, "mini-batch", mini_batch),
            (
                "rollout.log_prob_micro_batch_size_per_gpu",
                rollout.log_prob_micro_batch_size_per_gpu,
                "rollout batch",
                data.train_batch_size * rollout.n,
            ),
        ):
            if not micro or micro < 1 or (size // ranks) % micro:
                yield Finding(
                    "error",
                    "batch_size",
                    f"{name}={micro} does not divide the {size // ranks} responses of a rank's {of}",
                    f"choose a divisor, or set actor_rollout_ref.actor.use_dynamic_bsz=true ({name} is then unused)",
                )


def _micro_batches(config: DictConfig) -> Iterator[Finding]:
    actor, rollout, data = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.data
    if actor.use_dynamic_bsz != rollout.log_prob_use_dynamic_bsz:
        yield Finding(
            "error",
            "dynamic_batch_size",
            f"actor.use_dynamic_bsz={actor.use_dynamic_bsz} and rollout.log_prob_use_dynamic_bsz="
            f"{rollout.log_prob_use_dynamic_bsz}: verl wants them equal",
            "set only actor_rollout_ref.actor.use_dynamic_bsz; the other follows it",
        )
    longest = data.max_prompt_length + data.max_response_length
    split = max(actor.get("ulysses_sequence_parallel_size", 1), 1)
    for name, tokens in (
        ("actor.ppo_max_token_len_per_gpu", actor.ppo_max_token_len_per_gpu),
        ("rollout.log_prob_max_token_len_per_gpu", rollout.log_prob_max_token_len_per_gpu),
    ):
        if actor.use_dynamic_bsz and tokens * split < longest:
            yield Finding(
                "error",
                "token_budget",
                f"{name}={tokens} is less than the longest sequence, {longest} tokens",
                f"set actor_rollout_ref.{name} to {longest} or more",
            )
    if actor.policy_loss.loss_mode == "geo_mean":
        responses = actor.ppo_mini_batch_size * rollout.n // max(_data_parallel_size(config), 1)
        if actor.use_dynamic_bsz:
            one = actor.ppo_max_token_len_per_gpu >= responses * longest
            given = f"ppo_max_token_len_per_gpu={actor.ppo_max_token_len_per_gpu}"
        else:
            one = actor.ppo_micro_batch_size_per_gpu == responses
            given = f"ppo_micro_batch_size_per_gpu={actor.ppo_micro_batch_size_per_gpu}"
        if not one:
            yield Finding(
                "warning",
                "geo_mean",
                f"verl's geo_mean multiplies the gradient by the number of micro-batches in a mini-batch, and {given} "
                f"cuts the {responses} responses of a rank's mini-batch",
                "set actor_rollout_ref.actor.use_dynamic_bsz=true and ppo_max_token_len_per_gpu=100000000",
            )


def trainer_gpus(config: DictConfig) -> int:
    """GPUs of the trainer, or its ranks on a CPU."""
    return config.trainer.nnodes * config.trainer.n_gpus_per_node


def rollout_gpus(config: DictConfig) -> int:
    """GPUs of a rollout that has its own, beside the trainer's."""
    separate = config.trainer.use_v1 and config.trainer.v1.trainer_mode == "separate_async"
    rollout = config.actor_rollout_ref.rollout
    return rollout.nnodes * rollout.n_gpus_per_node if separate else 0


def _separate_rollout(config: DictConfig) -> Iterator[Finding]:
    """Of `trainer_mode=separate_async`: verl waits for ever for GPUs that there are not."""
    of_rollout = rollout_gpus(config)
    if not of_rollout:
        return
    wanted, given = trainer_gpus(config) + of_rollout, config.ray_kwargs.ray_init.get("num_gpus")
    if given is not None and given < wanted:
        yield Finding(
            "error",
            "gpus",
            f"ray_kwargs.ray_init.num_gpus={given}, and trainer and rollout want {wanted}: the run would wait for ever",
            f"set it to {wanted}, or to null on GPUs",
        )
    batch, mini_batch = config.data.train_batch_size, config.actor_rollout_ref.actor.ppo_mini_batch_size
    updates = config.trainer.v1.separate_async.parameter_sync_step
    if batch != updates * mini_batch:
        yield Finding(
            "error",
            "batch_size",
            f"data.train_batch_size={batch} is not trainer.v1.separate_async.parameter_sync_step={updates} times "
            f"ppo_mini_batch_size={mini_batch}, which verl's separate_async demands",
            "change one of them",
        )


def _parallelism(config: DictConfig) -> Iterator[Finding]:
    world = trainer_gpus(config)
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    splits = {"rollout (tensor x data parallel)": rollout.tensor_model_parallel_size * rollout.data_parallel_size}
    if actor.strategy == "megatron" and (megatron := actor.get("megatron")):
        pipeline = megatron.pipeline_model_parallel_size
        splits["Megatron (tensor x pipeline x context parallel)"] = (
            megatron.tensor_model_parallel_size * pipeline * megatron.context_parallel_size
        )
        experts = megatron.expert_tensor_parallel_size or megatron.tensor_model_parallel_size
        if megatron.expert_model_parallel_size > 1:
            splits["Megatron experts (expert x expert tensor x pipeline parallel)"] = (
                megatron.expert_model_parallel_size * experts * pipeline
            )
    else:
        splits["Ulysses sequence parallel"] = max(actor.get("ulysses_sequence_parallel_size", 1), 1)
    for name, size in splits.items():
        if world % size:
            yield Finding(
                "error",
                "parallelism",
                f"{name} needs groups of {size} GPUs, and {world} GPUs do not divide into them",
                "change the parallel sizes, trainer.nnodes or trainer.n_gpus_per_node",
            )


def _sampling(config: DictConfig) -> Iterator[Finding]:
    rollout = config.actor_rollout_ref.rollout
    wanted = (
        ("do_sample", rollout.do_sample, (True,)),
        ("temperature", rollout.temperature, (1, 1.0)),
        ("top_p", rollout.top_p, (1, 1.0)),
        ("top_k", rollout.top_k, (-1, 0)),
    )
    for name, value, fine in wanted:
        if value not in fine:
            yield Finding(
                "warning",
                "sampling",
                f"training samples with {name}={value}: they are not the policy's own, and the importance ratio is "
                "biased",
                f"set actor_rollout_ref.rollout.{name}={fine[0]}; validation has its own val_kwargs",
            )
    validation = rollout.val_kwargs
    if validation.n > 1 and not validation.do_sample:
        yield Finding(
            "warning",
            "validation",
            f"val_kwargs.n={validation.n} without sampling repeats the same greedy answer",
            "set actor_rollout_ref.rollout.val_kwargs.do_sample=true and a temperature, or n=1",
        )


def _rewards_and_seeds(config: DictConfig) -> Iterator[Finding]:
    if config.reward.custom_reward_function.path and config.reward.sandbox_fusion.url:
        yield Finding(
            "warning",
            "sandbox",
            "reward.sandbox_fusion.url is read by verl's own scorer only, and a custom reward function replaces it",
            "set +reward.custom_reward_function.reward_kwargs.sandbox_fusion_url instead",
        )
    if config.data.get("seed") is None and config.data.shuffle:
        yield Finding("warning", "seed", "the order of the prompts is not reproducible", "set data.seed=42, say")


def _workers(config: DictConfig) -> Iterator[Finding]:
    executable = (config.ray_kwargs.ray_init.get("runtime_env") or {}).get("py_executable")
    if "uv run" in str(executable):
        yield Finding(
            "warning",
            "py_executable",
            f"workers start with {executable!r}, an environment that may not have verl-sspo",
            "add verl-sspo to that lock file, or set ray_kwargs.ray_init.runtime_env.py_executable=null",
        )


def _weight_transfer(config: DictConfig) -> Iterator[Finding]:
    engine = config.actor_rollout_ref.rollout.checkpoint_engine
    if config.trainer.device != "cpu" and str(engine.custom_backend_module).startswith("verl_sspo.cpu."):
        key = "actor_rollout_ref.rollout.checkpoint_engine"
        yield Finding(
            "error",
            "weight_transfer",
            f"{key}.custom_backend_module={engine.custom_backend_module} is for trainer.device=cpu",
            f"on GPUs set {key}.backend=nccl {key}.custom_backend_module=null ray_kwargs.ray_init.num_gpus=null",
        )
