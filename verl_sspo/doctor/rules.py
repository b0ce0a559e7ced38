"""Checks the values of a configuration: each rule is a condition, a message and a remedy."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from math import prod
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.workers.config import ActorConfig, PolicyLossConfig

from verl_sspo.algorithm.gates import Gate
from verl_sspo.config import SSPOAdvantageConfig
from verl_sspo.doctor.finding import Finding, error, ok, warning
from verl_sspo.doctor.schema import SSPO_TARGET

#: Losses that are a mean over responses. sapo and geo_mean are, whatever loss_agg_mode is set.
SEQUENCE_LOSSES = ("sspo", "gspo", "sapo", "geo_mean")
GROUP_ESTIMATORS = ("sspo", "grpo", "grpo_vectorized", "rloo", "rloo_vectorized", "opo", "grpo_passk")
#: Slopes relative to that on the policy. Below the first at a log-ratio of 0.05 (on responses: a mean of 0.005) a gate
#: passes next to nothing. Above the second at a mean of 0.05 a gate on responses hardly ever closes.
SMALLEST_SLOPE, OPEN_SLOPE = 0.1, 0.7
ACTOR, ROLLOUT, CORRECTION = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "algorithm.rollout_correction"


def trainer_gpus(config: DictConfig) -> int:
    """The number of GPUs of the trainer; on a CPU, of its ranks."""
    return config.trainer.nnodes * config.trainer.n_gpus_per_node


def rollout_gpus(config: DictConfig) -> int:
    """The number of GPUs of the rollout; 0 if it shares those of the trainer."""
    separate = config.trainer.use_v1 and config.trainer.v1.trainer_mode == "separate_async"
    rollout = config.actor_rollout_ref.rollout
    return rollout.nnodes * rollout.n_gpus_per_node if separate else 0


class Facts:
    """Values that several rules use, from a configuration that has passed `schema`."""

    def __init__(self, config: DictConfig):
        self.config, self.data, self.algorithm, self.trainer = config, config.data, config.algorithm, config.trainer
        self.actor, self.rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
        self.loss, self.model = self.actor.policy_loss, config.actor_rollout_ref.model
        self.loss_mode, self.estimator = str(self.loss.loss_mode), str(config.algorithm.adv_estimator)
        distillation: Any = config.get("distillation") or {}
        # verl then sets the policy loss to 0 (verl.trainer.distillation.losses).
        self.distils_only = bool(distillation.get("enabled")) and not distillation.distillation_loss.use_task_rewards
        self.sspo = self.loss_mode == "sspo" and not self.distils_only
        self.correction = config.algorithm.get("rollout_correction") or {}
        self.bypass = bool(self.correction.get("bypass_mode"))
        self.longest = self.data.max_prompt_length + self.data.max_response_length

        # The section of the training engine in use, and the sizes of its parallel groups.
        engines: Any = [self.actor.get(name) for name in ("megatron", "veomni", "torchtitan", "fsdp_config")]
        empty: Any = {}
        self.engine: Any = next((engine for engine in engines if engine), empty)
        turbo = (self.engine.get("turbo_config") or empty).get("distributed") or empty
        # verl's three keys (the actor's is deprecated), and FSDP-Turbo's.
        keys = ("ulysses_sequence_parallel_size", "ulysses_parallel_size")
        sections: list[Any] = [self.actor, self.engine, turbo]
        self.sequence_parallel = max(section.get(key) or 1 for section in sections for key in keys)
        self.context_parallel = self._size("context_parallel_size")
        self.pipeline = self._size("pipeline_model_parallel_size", "pipeline_parallel_size")
        tensor = self._size("tensor_model_parallel_size", "tensor_parallel_size")
        self.model_parallel = tensor * self.pipeline * self.context_parallel * self.sequence_parallel
        self.world = trainer_gpus(config)
        self.ranks = max(self.world // self.model_parallel, 1)  # data-parallel
        self.mini_batch = self.actor.ppo_mini_batch_size * self.rollout.n  # responses

    def _size(self, *names: str) -> int:
        return prod(self.engine.get(name) or 1 for name in names)


def rule_findings(config: DictConfig) -> list[Finding]:
    """The findings of all rules for a configuration in which `schema` found no wrong value."""
    facts = Facts(config)
    areas = (_names, _gate, _objective, _correction, _batches, _micro_batches, _parallelism, _cpu, _sampling, _rewards)
    return [finding for area in areas for finding in area(facts)]


def _names(f: Facts) -> Iterator[Finding]:
    if OmegaConf.is_missing(f.rollout, "name"):
        yield error("rollout", f"{ROLLOUT}.name is not set", f"set {ROLLOUT}.name=vllm")
    for kind, name, registry in (
        ("policy loss", f.loss_mode, POLICY_LOSS_REGISTRY),
        ("advantage estimator", f.estimator, ADV_ESTIMATOR_REGISTRY),
    ):
        if name not in registry:
            known = ", ".join(sorted(str(getattr(key, "value", key)) for key in registry))
            yield error("registered", f"verl knows no {kind} {name!r}", f"choose one of {known}")
    if f.loss.get("_target_") == SSPO_TARGET and f.loss_mode != "sspo":
        message = f"SSPO's settings are given, but the command line sets loss_mode={f.loss_mode}"
        yield error("gate_unused", message, f"set {ACTOR}.policy_loss.loss_mode=sspo, or choose another algo=")
    try:
        options = SSPOAdvantageConfig.from_algorithm(f.algorithm)
    except ValueError as wrong:
        yield error("estimator", str(wrong), "correct it under algorithm.sspo")
        return
    # GRPO's estimators may ignore SSPO's defaults, which do the same.
    equal = f.estimator in ("sspo", "grpo", "grpo_vectorized") and options == SSPOAdvantageConfig()
    if f.algorithm.get("sspo") is not None and f.estimator != "sspo" and not equal:
        message = f"adv_estimator={f.estimator} does not read algorithm.sspo"
        yield warning("estimator", message, "set algorithm.adv_estimator=sspo, or remove algorithm.sspo")


def _gate(f: Facts) -> Iterator[Finding]:
    if f.loss_mode != "sspo":
        return
    try:
        gate = Gate.of_policy_loss(f.loss)
    except ValueError as wrong:
        yield error("gate", str(wrong), f"correct it under {ACTOR}.policy_loss")
        return
    loss, taus = f"{ACTOR}.policy_loss", {"tau_pos": gate.tau_pos, "tau_neg": gate.tau_neg}
    of_sapo = tuple(taus.values()) == (ActorConfig.tau_pos, ActorConfig.tau_neg)
    if of_sapo and gate.shape != "sigmoid" and f.loss.get("_target_") == SSPO_TARGET:
        message = "tau_pos=1 and tau_neg=1.05 are SAPO's temperatures, for its sigmoid, and leave this gate wide open"
        yield warning("temperature", message, f"set {loss}.tau_pos=10 {loss}.tau_neg=12")
    # The mean log-ratio of a response is smaller than the log-ratios of its tokens.
    of_tokens = gate.level == "token"
    what, moved, tau_of_recipe = (
        ("a token whose probability moved by 5 %", 0.05, "10; the papers use 1 to 12")
        if of_tokens
        else ("a response whose mean log-ratio is 0.005", 0.005, "100")
    )
    for name, tau in taus.items():
        at = torch.tensor([-moved, moved, 0.05], dtype=torch.float64)
        temperature = torch.tensor(tau, dtype=torch.float64)
        slopes = gate.log_value_and_slope(at, temperature)[1] / gate.on_policy_slope(temperature)
        kept = float(slopes[:2].max())
        if kept < SMALLEST_SLOPE:
            message = f"at {name}={tau:g} {what} keeps {kept:.1%} of its gradient"
            yield warning("temperature", message, f"set {loss}.{name}={tau_of_recipe}")
        elif not of_tokens and slopes[2] > OPEN_SLOPE:
            message = f"{name}={tau:g} is a temperature for tokens, and leaves a gate on responses wide open"
            yield warning("temperature", message, f"set {loss}.{name}={tau_of_recipe}")


def _objective(f: Facts) -> Iterator[Finding]:
    if f.loss_mode == "sspo" and f.distils_only:
        message = "distillation without task rewards sets the policy loss to 0: SSPO has no effect"
        yield warning("distillation", message, "set distillation.distillation_loss.use_task_rewards=true")
        return
    if unread := _unread(f):
        message = f"loss_mode={f.loss_mode} does not read {', '.join(unread)}"
        yield warning("unread", message, "remove it, or choose the loss that reads it")
    if f.algorithm.get("gdpo_reward_keys") and f.estimator != "gdpo":
        message = f"adv_estimator={f.estimator} does not read algorithm.gdpo_reward_keys"
        yield warning("unread", message, "remove it, or set algorithm.adv_estimator=gdpo")
    if f.loss_mode in SEQUENCE_LOSSES and f.actor.loss_agg_mode != "seq-mean-token-mean":
        message = f"loss_agg_mode={f.actor.loss_agg_mode}, but {f.loss_mode} is a mean over responses"
        yield warning("aggregation", message, f"set {ACTOR}.loss_agg_mode=seq-mean-token-mean")
    one_update = f.actor.ppo_epochs == 1 and f.data.train_batch_size <= f.actor.ppo_mini_batch_size
    if f.sspo and one_update and not f.bypass:
        message = (
            f"one update per rollout (train_batch_size={f.data.train_batch_size}, ppo_mini_batch_size="
            f"{f.actor.ppo_mini_batch_size}): every ratio is 1, and SSPO trains as GRPO does"
        )
        quarter = max(f.data.train_batch_size // 4, 1)
        yield warning("on_policy", message, f"set {ACTOR}.ppo_mini_batch_size={quarter}")
    if f.rollout.n == 1 and f.estimator in GROUP_ESTIMATORS:
        message = "rollout.n=1 is a group of one response: it has no baseline, the advantage is the reward"
        yield warning("group_size", message, f"set {ROLLOUT}.n=8")
    loss = f.actor.use_kl_loss and f.actor.kl_loss_coef
    reward = f.algorithm.use_kl_in_reward and f.algorithm.kl_ctrl.kl_coef
    if f.sspo and (loss or reward):
        yield ok("kl", f"a KL term with coefficient {loss or reward} is added; SSPO's objective has none")


def _unread(f: Facts) -> list[str]:
    """Changed settings that only other losses read: the source of the chosen loss does not name them."""
    changed = []
    if f.loss_mode in POLICY_LOSS_REGISTRY and f.loss_mode != "bypass_mode":
        words = {name: set(re.findall(r"\w+", inspect.getsource(loss))) for name, loss in POLICY_LOSS_REGISTRY.items()}
        others = set().union(*words.values()) - words[f.loss_mode]
        for path, section, cls in ((ACTOR, f.actor, ActorConfig), (f"{ACTOR}.policy_loss", f.loss, PolicyLossConfig)):
            for field in fields(cls):
                value = section.get(field.name, field.default)
                if field.name in others and "float" in str(field.type) and value != field.default:
                    changed.append(f"{path}.{field.name}={value}")
    return changed


def _correction(f: Facts) -> Iterator[Finding]:
    get, has_log_probs = f.correction.get, f.rollout.calculate_log_probs
    weighs = bool(get("rollout_is") or get("rollout_rs"))
    if not weighs and not f.bypass:
        return
    ask = f"set {ROLLOUT}.calculate_log_probs=true"
    if f.bypass:
        if not f.trainer.use_v1 and f.loss_mode == "sspo":
            message = "with trainer.use_v1=false bypass_mode replaces loss_mode=sspo with one of verl's losses"
            yield error("rollout_correction", message, "set trainer.use_v1=true")
        if not has_log_probs:
            yield error("rollout_correction", "bypass_mode=true needs the log-probs of the rollout", ask)
        defaults = {"rollout_is": None, "rollout_rs": None, "loss_type": "ppo_clip"}
        unread = [f"{key}={get(key)}" for key, default in defaults.items() if get(key, default) not in (None, default)]
        if unread and f.loss_mode != "bypass_mode":
            message = f"in bypass mode only loss_mode=bypass_mode reads {', '.join(unread)}, not {f.loss_mode}"
            yield warning("bypass_mode", message, f"set {CORRECTION}.bypass_mode=false")
        elif f.sspo:
            entropy = (
                "" if f.actor.calculate_entropy else f" (for actor/entropy_loss set {ACTOR}.calculate_entropy=true)"
            )
            effect = "bypass mode: the gates also act on the rollout's lag and on the difference between its engine and"
            yield ok("rollout_correction", f"{effect} the actor's{entropy}")
        return
    # Ask verl's own function what it does to responses far below, far above and on the policy.
    options = {key: value for key, value in f.correction.items() if key.startswith(("rollout_is", "rollout_rs"))}
    log_ratio, mask = torch.tensor([[-9.0, 0.0], [0.0, 9.0], [0.0, 0.0]]), torch.ones(3, 2)
    try:
        weights, _, _ = compute_rollout_correction_and_rejection_mask(log_ratio, 0 * log_ratio, mask, **options)
    except (ValueError, TypeError) as wrong:
        yield error("rollout_correction", " ".join(str(wrong).split()), f"correct it under {CORRECTION}")
        return
    if not has_log_probs:
        message = "rollout_is and rollout_rs do nothing without the log-probs of the rollout"
        yield warning("rollout_correction", message, ask)
    elif f.sspo:
        unit, bounds, effects = "response", get("rollout_is_threshold"), []
        if get("rollout_is") == "token":
            unit = "token"
            effects.append(
                "takes the geometric mean of token weights (if their logs have sd 1, 0.61 of the update is left)"
            )
        if weights is not None and (weights.batch["rollout_is_weights"] == 0).any():
            effects.append(f"leaves out {unit}s whose weight is outside {bounds} (weight 0)")
        elif weights is not None:
            effects.append(f"truncates the weights of {unit}s at {bounds}")
        if get("rollout_rs"):
            effects.append(f"rejects by mask ({get('rollout_rs')}, threshold {get('rollout_rs_threshold')})")
        yield ok("rollout_correction", f"SSPO {', '.join(effects)}")


def _batches(f: Facts) -> Iterator[Finding]:
    batch, mini_batch = f.data.train_batch_size, f.actor.ppo_mini_batch_size
    if batch % min(mini_batch, batch):
        message = (
            f"data.train_batch_size={batch} is not a multiple of ppo_mini_batch_size={mini_batch}: empty rows are added"
        )
        yield error("batch_size", message, f"set data.train_batch_size={-(-batch // mini_batch) * mini_batch}")
    if f.mini_batch % f.ranks:
        message = (
            f"a mini-batch of {mini_batch} prompts x {f.rollout.n} responses cannot be split evenly over {f.ranks} "
            "data-parallel ranks"
        )
        up = -(-mini_batch // f.ranks) * f.ranks
        yield error("batch_size", message, f"set {ACTOR}.ppo_mini_batch_size={up} data.train_batch_size={4 * up}")
    updates = f.trainer.v1.separate_async.parameter_sync_step
    if rollout_gpus(f.config) and batch != updates * mini_batch:
        message = f"separate_async needs data.train_batch_size={batch} to be parameter_sync_step={updates} mini-batches"
        yield error("batch_size", message, f"set data.train_batch_size={updates * mini_batch}")


def _micro_batches(f: Facts) -> Iterator[Finding]:
    per_rank, whole = f.mini_batch // f.ranks, f.data.train_batch_size * f.rollout.n // f.ranks
    dynamic = f"set {ACTOR}.use_dynamic_bsz=true"
    if f.actor.use_dynamic_bsz != f.rollout.log_prob_use_dynamic_bsz:
        message = (
            f"actor.use_dynamic_bsz={f.actor.use_dynamic_bsz} and rollout.log_prob_use_dynamic_bsz="
            f"{f.rollout.log_prob_use_dynamic_bsz} must be equal"
        )
        same = str(f.actor.use_dynamic_bsz).lower()
        yield error("dynamic_batch_size", message, f"set {ROLLOUT}.log_prob_use_dynamic_bsz={same}")
    keys = {
        f"{ACTOR}.ppo_micro_batch_size": (f.actor, per_rank, f"{ACTOR}.ppo_max_token_len_per_gpu"),
        f"{ROLLOUT}.log_prob_micro_batch_size": (f.rollout, whole, f"{ROLLOUT}.log_prob_max_token_len_per_gpu"),
    }
    missing, short, needed = [], [], -(-f.longest // (f.sequence_parallel * f.context_parallel))
    for path, (section, responses, budget) in keys.items():
        name = path.rsplit(".", 1)[-1]
        size = section.get(f"{name}_per_gpu")
        if f.actor.use_dynamic_bsz:
            short += [f"{budget}={needed}"] if section.get(budget.rsplit(".", 1)[-1]) < needed else []
        elif size is None and not section.get(name):  # the key without _per_gpu is deprecated and counts all GPUs
            missing.append(f"{path}_per_gpu")
        elif size is not None and not f.mini_batch % f.ranks and (size < 1 or responses % size):
            message = f"{path}_per_gpu={size} does not divide the {responses} responses of a rank"
            yield error("batch_size", message, f"choose a divisor, or {dynamic}")
    if missing:
        yield error("micro_batch_size", f"no micro-batch size is set: {' and '.join(missing)}", dynamic)
    if short:
        message = f"a micro-batch cannot hold the longest sequence of {f.longest} tokens"
        yield error("token_budget", message, f"set {' '.join(short)}")
    dynamic_holds = f.actor.use_dynamic_bsz and f.actor.ppo_max_token_len_per_gpu >= per_rank * f.longest
    one = dynamic_holds or (not f.actor.use_dynamic_bsz and f.actor.ppo_micro_batch_size_per_gpu == per_rank)
    if f.loss_mode == "geo_mean" and not one:
        message = "verl's geo_mean multiplies the gradient by the number of micro-batches per mini-batch"
        yield warning("geo_mean", message, f"{dynamic} {ACTOR}.ppo_max_token_len_per_gpu=100000000")


def _parallelism(f: Facts) -> Iterator[Finding]:
    experts = f.engine.get("expert_model_parallel_size") or 1
    tensor = f.engine.get("expert_tensor_parallel_size") or f.engine.get("tensor_model_parallel_size") or 1
    for name, size in {
        "the rollout (tensor x data parallel)": f.rollout.tensor_model_parallel_size * f.rollout.data_parallel_size,
        "the model (tensor x pipeline x context or sequence parallel)": f.model_parallel,
        "its experts (expert x tensor x pipeline parallel)": experts * tensor * f.pipeline if experts > 1 else 1,
    }.items():
        if f.world % size:
            message = f"{name} needs groups of {size} GPUs, and {f.world} GPUs cannot be split into them"
            yield error("parallelism", message, "change the parallel sizes or trainer.n_gpus_per_node")
    if f.context_parallel > 1 and f.actor.strategy == "megatron" and not f.model.use_remove_padding:
        message = f"context_parallel_size={f.context_parallel} fails in verl 0.9.1 if sequences are padded"
        yield error("context_parallel", message, "set actor_rollout_ref.model.use_remove_padding=true")
    wanted, given = f.world + rollout_gpus(f.config), (f.config.ray_kwargs.get("ray_init") or {}).get("num_gpus")
    if wanted > f.world and given is not None and given < wanted:
        message = (
            f"ray_kwargs.ray_init.num_gpus={given}, but trainer and rollout need {wanted}: verl would wait forever"
        )
        yield error("gpus", message, f"set ray_kwargs.ray_init.num_gpus={wanted}, or null on GPUs")
    key = f"{ROLLOUT}.checkpoint_engine"
    module = str(f.rollout.checkpoint_engine.custom_backend_module)
    if f.trainer.device != "cpu" and module == "verl_sspo.cpu.weights":
        gpus = f"{key}.backend=nccl {key}.custom_backend_module=null ray_kwargs.ray_init.num_gpus=null"
        message = f"checkpoint_engine.custom_backend_module={module} is for trainer.device=cpu"
        yield error("weight_transfer", message, f"on GPUs set {gpus}")


def _cpu(f: Facts) -> Iterator[Finding]:
    """Settings that the platform `cpu` or the rollout `hf` cannot run: each of them crashes after the start."""
    section = f.model.get("lora") or {}
    lora = max(section.get("rank") or 0, f.model.get("lora_rank") or 0) > 0
    if f.rollout.get("name") == "hf" and lora and not section.get("merge"):
        message = "the rollout hf generates with LoRA only if the adapters are merged"
        yield error("cpu", message, "set actor_rollout_ref.model.lora.merge=true")
    if f.trainer.device != "cpu":
        return
    if f.config.critic.enable or (f.estimator == "gae" and need_critic(f.config)):
        yield error("cpu", "there is no critic on a CPU", "set algorithm.adv_estimator=sspo critic.enable=false")
    if need_reference_policy(f.config) and not lora:
        message = "KL terms need a reference policy, and there is none on a CPU"
        yield error("cpu", message, f"set {ACTOR}.use_kl_loss=false algorithm.use_kl_in_reward=false")


def _sampling(f: Facts) -> Iterator[Finding]:
    if f.rollout.temperature is None or f.rollout.temperature <= 0:
        message = f"{ROLLOUT}.temperature={f.rollout.temperature}: all responses of a group would be the same"
        yield error("sampling", message, f"set {ROLLOUT}.temperature=1.0")
    # verl applies the temperature to the actor's logits too, but not top_p and top_k.
    wanted: dict[str, tuple[Any, ...]] = {"do_sample": (True,), "top_p": (1,), "top_k": (-1, 0)}
    if other := {key: fine[0] for key, fine in wanted.items() if f.rollout[key] not in fine}:
        given = ", ".join(f"{key}={f.rollout[key]}" for key in other)
        remedy = " ".join(f"{ROLLOUT}.{key}={value}".lower() for key, value in other.items())
        message = f"training samples with {given}, not from the policy itself: the importance ratio is biased"
        yield warning("sampling", message, f"set {remedy}")
    validation = f.rollout.val_kwargs
    if (validation.n or 1) > 1 and not validation.do_sample:
        message = f"val_kwargs.n={validation.n} without sampling repeats the same greedy answer"
        yield warning("validation", message, f"set {ROLLOUT}.val_kwargs.do_sample=true")


def _rewards(f: Facts) -> Iterator[Finding]:
    key = "trainer.v1.sampler.custom_sampler"
    sampler = OmegaConf.select(f.config, f"{key}.path")
    filters = (f.algorithm.get("filter_groups") or {}).get("enable")
    if filters and sampler and not str(sampler).startswith("pkg://verl_sspo."):
        message = (
            "verl passes algorithm.filter_groups only to its own replay buffers, and a custom sampler replaces them"
        )
        yield warning("filter_groups", message, f"set {key}.path=null {key}.name=null")
    url = f.config.reward.sandbox_fusion.url
    if f.config.reward.custom_reward_function.path and url:
        message = "a custom reward function does not read reward.sandbox_fusion.url"
        new = f"+reward.custom_reward_function.reward_kwargs.sandbox_fusion_url={url}"
        yield warning("sandbox", message, f"set {new} reward.sandbox_fusion.url=null")
