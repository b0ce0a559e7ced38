"""The table of what a configuration reveals: each rule is a condition, a message and a remedy."""

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from math import prod
from typing import Any

import torch
from omegaconf import DictConfig
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.workers.config import ActorConfig, PolicyLossConfig

from verl_sspo.algorithm.gates import Gate
from verl_sspo.config import SSPOAdvantageConfig
from verl_sspo.doctor.finding import Finding, Severity
from verl_sspo.doctor.interpreter import interpreter_findings
from verl_sspo.doctor.schema import SSPO_TARGET

#: Losses that are a mean over responses. sapo and geo_mean aggregate so whatever is configured.
SEQUENCE_LOSSES = ("sspo", "gspo", "sapo", "geo_mean")
GROUP_ESTIMATORS = ("sspo", "grpo", "grpo_vectorized", "rloo", "rloo_vectorized", "opo", "grpo_passk")
#: A gate that passes less than this at a log-ratio of 0.05 passes next to nothing.
SMALLEST_SLOPE = 0.1
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
CORRECTION = "algorithm.rollout_correction"


def trainer_gpus(config: DictConfig) -> int:
    """GPUs of the trainer; on a CPU its ranks."""
    return config.trainer.nnodes * config.trainer.n_gpus_per_node


def rollout_gpus(config: DictConfig) -> int:
    """GPUs of a rollout that does not share those of the trainer."""
    separate = config.trainer.use_v1 and config.trainer.v1.trainer_mode == "separate_async"
    rollout = config.actor_rollout_ref.rollout
    return rollout.nnodes * rollout.n_gpus_per_node if separate else 0


class Facts:
    """What the rules ask of a configuration whose values have passed `schema`."""

    def __init__(self, config: DictConfig):
        self.config, self.data, self.algorithm, self.trainer = config, config.data, config.algorithm, config.trainer
        self.actor, self.rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
        self.loss, self.model = self.actor.policy_loss, config.actor_rollout_ref.model
        self.loss_mode, self.estimator = str(self.loss.loss_mode), str(config.algorithm.adv_estimator)
        self.correction = config.algorithm.get("rollout_correction") or {}
        self.ray = config.ray_kwargs.get("ray_init") or {}
        # verl sets the policy loss to 0 then (verl.trainer.distillation.losses).
        distillation = config.get("distillation") or {}
        self.distils_only = bool(distillation.get("enabled")) and not distillation.distillation_loss.use_task_rewards
        self.names_sspo = self.loss_mode == "sspo"
        self.sspo = self.names_sspo and not self.distils_only
        self.has_gate = self.loss.get("_target_") == SSPO_TARGET
        self.corrects = bool(self.correction.get("rollout_is") or self.correction.get("rollout_rs"))
        self.bypass = bool(self.correction.get("bypass_mode"))

    # Parallelism.

    @cached_property
    def engine(self) -> Any:
        """The section of the training engine, whichever it is."""
        names = ("megatron", "veomni", "torchtitan", "fsdp_config")
        return next((self.actor[name] for name in names if self.actor.get(name)), {})

    @cached_property
    def sequence_parallel(self) -> int:
        """Ranks that share a sequence: three keys of verl, of which the actor's own is deprecated, and FSDP-Turbo's."""
        turbo = (self.engine.get("turbo_config") or {}).get("distributed") or {}
        return max(
            self.actor.get("ulysses_sequence_parallel_size") or 1,
            self.engine.get("ulysses_sequence_parallel_size") or 1,
            self.engine.get("ulysses_parallel_size") or 1,
            turbo.get("ulysses_parallel_size") or 1,
        )

    @cached_property
    def splits(self) -> dict[str, int]:
        """Sizes of the groups into which the GPUs of the trainer have to divide."""
        engine, rollout = self.engine, self.rollout
        name = "Megatron" if self.actor.strategy == "megatron" else "the trainer"
        model = "tensor_model_parallel_size", "tensor_parallel_size", "context_parallel_size"
        pipeline = engine.get("pipeline_model_parallel_size") or engine.get("pipeline_parallel_size") or 1
        ranks = prod(engine.get(key) or 1 for key in model) * pipeline * self.sequence_parallel
        experts = engine.get("expert_model_parallel_size") or 1
        tensor = engine.get("expert_tensor_parallel_size") or engine.get("tensor_model_parallel_size") or 1
        return {
            "the rollout (tensor x data parallel)": rollout.tensor_model_parallel_size * rollout.data_parallel_size,
            f"{name} (tensor x pipeline x context or sequence parallel)": ranks,
            "Megatron's experts (expert x tensor x pipeline parallel)": experts * tensor * pipeline if experts > 1 else 1,
        }

    @property
    def world(self) -> int:
        return trainer_gpus(self.config)

    @property
    def wanted_gpus(self) -> int:
        return self.world + rollout_gpus(self.config)

    @property
    def ranks(self) -> int:
        """Data-parallel ranks of the trainer."""
        return max(self.world // list(self.splits.values())[1], 1)

    @property
    def broken_split(self) -> str:
        each = (f"{name} needs groups of {size}" for name, size in self.splits.items() if self.world % size)
        return next(each, "")

    # Batches.

    @property
    def mini_batch(self) -> int:
        """Responses per update."""
        return self.actor.ppo_mini_batch_size * self.rollout.n

    @property
    def per_rank(self) -> int:
        return self.mini_batch // self.ranks

    @property
    def longest(self) -> int:
        return self.data.max_prompt_length + self.data.max_response_length

    @cached_property
    def micro_batches(self) -> dict[str, tuple[Any, int]]:
        """Micro-batch sizes per GPU, each with the responses of a rank that it has to divide."""
        if self.actor.use_dynamic_bsz:
            return {}
        batch = self.data.train_batch_size * self.rollout.n // self.ranks
        sizes = {
            f"{ACTOR}.ppo_micro_batch_size": (self.actor, self.per_rank),
            f"{ROLLOUT}.log_prob_micro_batch_size": (self.rollout, batch),
        }
        found = {}
        for path, (section, responses) in sizes.items():
            name = path.rsplit(".", 1)[-1]
            if not section.get(name):  # deprecated: of all GPUs
                found[f"{path}_per_gpu"] = (section.get(f"{name}_per_gpu"), responses)
        return found

    @property
    def missing_micro_batches(self) -> str:
        return ", ".join(path for path, (size, _) in self.micro_batches.items() if size is None)

    @property
    def broken_micro_batch(self) -> str:
        if self.mini_batch % self.ranks:
            return ""  # reported by itself
        each = (
            f"{path}={size} does not divide the {responses} responses of a rank"
            for path, (size, responses) in self.micro_batches.items()
            if size is not None and (size < 1 or responses % size)
        )
        return "; ".join(each)

    @property
    def token_budgets(self) -> str:
        """Budgets that do not hold the longest sequence, as overrides that do."""
        split = self.sequence_parallel * (self.engine.get("context_parallel_size") or 1)
        keys = (f"{ACTOR}.ppo_max_token_len_per_gpu", f"{ROLLOUT}.log_prob_max_token_len_per_gpu")
        sizes = (self.actor.ppo_max_token_len_per_gpu, self.rollout.log_prob_max_token_len_per_gpu)
        needed = -(-self.longest // split)
        short = [f"{key}={needed}" for key, size in zip(keys, sizes, strict=True) if size < needed]
        return " ".join(short) if self.actor.use_dynamic_bsz else ""

    @property
    def geo_mean_is_cut(self) -> bool:
        if self.loss_mode != "geo_mean":
            return False
        if self.actor.use_dynamic_bsz:
            return self.actor.ppo_max_token_len_per_gpu < self.per_rank * self.longest
        return self.actor.ppo_micro_batch_size_per_gpu != self.per_rank

    # The algorithm.

    @property
    def unknown_names(self) -> str:
        """Loss and estimator that verl does not know, with those that it knows."""
        registries = (("policy loss", self.loss_mode, POLICY_LOSS_REGISTRY),)
        registries += (("advantage estimator", self.estimator, ADV_ESTIMATOR_REGISTRY),)
        return "; ".join(
            f"no {kind} {name!r}: it has {', '.join(sorted(str(getattr(key, 'value', key)) for key in registry))}"
            for kind, name, registry in registries
            if name not in registry
        )

    @cached_property
    def unread(self) -> str:
        """Settings of other losses that the source of the chosen one does not name."""
        if self.distils_only or self.loss_mode not in POLICY_LOSS_REGISTRY or self.loss_mode == "bypass_mode":
            return ""
        words = {name: set(re.findall(r"\w+", inspect.getsource(loss))) for name, loss in POLICY_LOSS_REGISTRY.items()}
        mine, others = words[self.loss_mode], set().union(*words.values())
        of_losses = [field for cls in (ActorConfig, PolicyLossConfig) for field in fields(cls) if "float" in str(field.type)]
        changed = [
            f"{path}.{field.name}={section.get(field.name)}"
            for path, section in ((ACTOR, self.actor), (f"{ACTOR}.policy_loss", self.loss))
            for field in of_losses
            if field.name in others - mine
            and (field.name in ActorConfig.__dataclass_fields__) == (section is self.actor)
            and section.get(field.name, field.default) != field.default
        ]
        if self.algorithm.get("gdpo_reward_keys") and self.estimator != "gdpo":
            changed.append(f"algorithm.gdpo_reward_keys={self.algorithm.gdpo_reward_keys}")
        return ", ".join(changed)

    @cached_property
    def gate(self) -> Gate | None:
        return None if self.gate_error else Gate.of_policy_loss(self.loss)

    @cached_property
    def gate_error(self) -> str:
        try:
            Gate.of_policy_loss(self.loss) if self.names_sspo else None
        except ValueError as error:
            return str(error)
        return ""

    @property
    def sapo_temperatures(self) -> bool:
        """SAPO's defaults of verl on a gate that is not SAPO's."""
        if not self.sspo or self.gate is None or (self.gate.shape, self.gate.domain) == ("sigmoid", "ratio"):
            return False
        return (self.gate.tau_pos, self.gate.tau_neg) == (ActorConfig.tau_pos, ActorConfig.tau_neg)

    @property
    def narrow_gate(self) -> str:
        """Temperatures at which a token whose probability moved by 5 % keeps next to nothing of its gradient."""
        if not self.sspo or self.gate is None:
            return ""
        moved = torch.tensor([-0.05, 0.05], dtype=torch.float64)
        kept = {}
        for name, tau in (("tau_pos", self.gate.tau_pos), ("tau_neg", self.gate.tau_neg)):
            temperature = torch.tensor(tau, dtype=torch.float64)
            slope = self.gate.log_value_and_slope(moved, temperature)[1] / self.gate.on_policy_slope(temperature)
            kept[f"{name}={tau:g}"] = float(slope.max())
        return ", ".join(f"{name} keeps {slope:.1%}" for name, slope in kept.items() if slope < SMALLEST_SLOPE)

    @property
    def estimator_error(self) -> str:
        try:
            SSPOAdvantageConfig.from_algorithm(self.algorithm)
        except ValueError as error:
            return str(error)
        return ""

    @property
    def unread_estimator_options(self) -> bool:
        """`algorithm.sspo` beside another estimator; beside grpo its defaults are what grpo does."""
        if self.algorithm.get("sspo") is None or self.estimator == "sspo" or self.estimator_error:
            return False
        same = self.estimator.startswith("grpo") and self.estimator != "grpo_passk"
        return not same or SSPOAdvantageConfig.from_algorithm(self.algorithm) != SSPOAdvantageConfig()

    # Sampling and rollout correction.

    @property
    def samples_from_another_policy(self) -> str:
        """verl scales the actor's logits by the temperature too, but cuts nothing from its distribution."""
        wanted = {"do_sample": (True,), "top_p": (1, 1.0), "top_k": (-1, 0)}
        other = (f"{ROLLOUT}.{key}={fine[0]}".lower() for key, fine in wanted.items() if self.rollout[key] not in fine)
        return " ".join(other)

    @property
    def correction_error(self) -> str:
        return self._effect_of_correction[1]

    @property
    def correction_effect(self) -> str:
        """What the rollout correction does to the loss `sspo`."""
        if self.bypass:
            return (
                "old log-probs are those of the rollout, so the gates also act on its lag and its engine"
                f"{'' if self.actor.calculate_entropy else '; the entropy is not logged'}"
            )
        return self._effect_of_correction[0] if self.rollout.calculate_log_probs else ""

    @cached_property
    def _effect_of_correction(self) -> tuple[str, str]:
        """(effect, error): verl's own function is asked, with one token far below, one on and one far above policy."""
        if not self.corrects:
            return "", ""
        options = {key: value for key, value in self.correction.items() if key.startswith(("rollout_is", "rollout_rs"))}
        log_ratio, mask = torch.tensor([[-9.0, 0.0], [0.0, 9.0]]), torch.ones(2, 2)
        try:
            answer = compute_rollout_correction_and_rejection_mask(log_ratio, log_ratio * 0, mask, **options)
        except (ValueError, TypeError) as error:
            return "", " ".join(str(error).split())
        effects = []
        if answer[0] is not None:
            unit = "token" if options["rollout_is"] == "token" else "response"
            bounds = options["rollout_is_threshold"]
            if (answer[0].batch["rollout_is_weights"] == 0).any():
                effects.append(f"leaves out {unit}s whose weight is outside {bounds} (weight 0)")
            else:
                effects.append(f"truncates the weights of {unit}s at {bounds}")
            if unit == "token":
                effects.append(
                    "the geometric mean of token weights damps the update: to 0.60 of its size at log-weights of "
                    "standard deviation 1"
                )
        if options.get("rollout_rs"):
            effects.append(f"rejects by mask ({options['rollout_rs']} outside {options['rollout_rs_threshold']})")
        return "; ".join(effects), ""

    @property
    def unread_correction(self) -> str:
        """Settings that verl reads in bypass mode only with its own loss `bypass_mode`."""
        if not self.bypass or self.loss_mode == "bypass_mode":
            return ""
        defaults = {"rollout_is": None, "rollout_rs": None, "loss_type": "ppo_clip"}
        set_here = {key: self.correction.get(key, default) for key, default in defaults.items()}
        return ", ".join(f"{key}={value}" for key, value in set_here.items() if value not in (None, defaults[key]))

    # What the rollout and the platform `cpu` can do.

    @property
    def on_cpu(self) -> bool:
        return self.trainer.device == "cpu"

    @property
    def lora(self) -> bool:
        return max((self.model.get("lora") or {}).get("rank") or 0, self.model.get("lora_rank") or 0) > 0

    @property
    def reference(self) -> bool:
        return bool(need_reference_policy(self.config))

    @property
    def critic(self) -> bool:
        return self.config.critic.enable or (self.estimator == "gae" and bool(need_critic(self.config)))

    @property
    def kl_terms(self) -> str:
        loss = self.actor.use_kl_loss and self.actor.kl_loss_coef
        reward = self.algorithm.use_kl_in_reward and self.algorithm.kl_ctrl.kl_coef
        terms = (f"the KL loss with coefficient {loss}" if loss else "", f"a KL penalty of {reward} in the reward")
        return " and ".join(term for term, on in zip(terms, (loss, reward), strict=True) if on)

    @property
    def filtered_by_another_buffer(self) -> bool:
        path = str((self.trainer.v1.sampler.get("custom_sampler") or {}).get("path") or "")
        return bool(path) and not path.startswith("pkg://verl_sspo.") and bool(self.filters)

    @property
    def filters(self) -> bool:
        return bool((self.algorithm.get("filter_groups") or {}).get("enable"))

    @property
    def cpu_transfer_on_gpus(self) -> bool:
        module = str(self.rollout.checkpoint_engine.custom_backend_module)
        return not self.on_cpu and module.startswith("verl_sspo.cpu.")


@dataclass(frozen=True)
class Rule:
    """One check. `message` and `remedy` are formatted with `f`, the `Facts`, and `found`, what `when` returned."""

    severity: Severity
    check: str
    when: Callable[[Facts], Any]
    message: str
    remedy: str = ""


RULES = (
    # The algorithm.
    Rule("error", "registered", lambda f: f.unknown_names, "verl knows {found}", "correct the name"),
    Rule(
        "error",
        "gate_unused",
        lambda f: f.has_gate and not f.names_sspo,
        "policy_loss has the gate of SSPO, but loss_mode={f.loss_mode} is trained: a key on the command line wins over "
        "algo=sspo",
        f"set {ACTOR}.policy_loss.loss_mode=sspo, or choose another algo=",
    ),
    Rule("error", "gate", lambda f: f.gate_error, "{found}", f"correct it under {ACTOR}.policy_loss"),
    Rule("error", "estimator", lambda f: f.estimator_error, "{found}", "correct it under algorithm.sspo"),
    Rule(
        "warning",
        "estimator",
        lambda f: f.unread_estimator_options,
        "adv_estimator={f.estimator} does not read algorithm.sspo",
        "set algorithm.adv_estimator=sspo, or remove algorithm.sspo",
    ),
    Rule(
        "warning",
        "temperature",
        lambda f: f.sapo_temperatures,
        "tau_pos={f.gate.tau_pos:g} and tau_neg={f.gate.tau_neg:g} are SAPO's, for its sigmoid of the ratio, not for the "
        "{f.gate.shape} of the {f.gate.domain}",
        f"set {ACTOR}.policy_loss.tau_pos=10 {ACTOR}.policy_loss.tau_neg=12, or remove them",
    ),
    Rule(
        "warning",
        "temperature",
        lambda f: f.narrow_gate,
        "a narrow gate: of the gradient of a token whose probability moved by 5 %, {found}",
        f"set {ACTOR}.policy_loss.tau_pos and tau_neg to values of 1 to 12, as the papers do",
    ),
    Rule(
        "warning",
        "unread",
        lambda f: f.unread,
        "loss_mode={f.loss_mode} does not read {found}",
        "remove these, or choose the loss that reads them",
    ),
    Rule(
        "warning",
        "aggregation",
        lambda f: f.loss_mode in SEQUENCE_LOSSES and f.actor.loss_agg_mode != "seq-mean-token-mean",
        "loss_agg_mode={f.actor.loss_agg_mode}, but {f.loss_mode} is a mean over responses",
        f"set {ACTOR}.loss_agg_mode=seq-mean-token-mean",
    ),
    Rule(
        "warning",
        "distillation",
        lambda f: f.names_sspo and f.distils_only,
        "distillation without task rewards sets the policy loss to 0: SSPO has no effect",
        "set distillation.distillation_loss.use_task_rewards=true",
    ),
    Rule(
        "warning",
        "on_policy",
        lambda f: (
            f.sspo
            and not f.bypass
            and f.actor.ppo_epochs == 1
            and f.data.train_batch_size <= f.actor.ppo_mini_batch_size
        ),
        "one update per rollout (train_batch_size={f.data.train_batch_size}, ppo_mini_batch_size="
        "{f.actor.ppo_mini_batch_size}): every ratio is 1, and SSPO trains as GRPO does",
        f"set {ACTOR}.ppo_mini_batch_size to a fraction of data.train_batch_size, for example a quarter",
    ),
    Rule("ok", "kl", lambda f: f.sspo and f.kl_terms, "{found}, which SSPO's objective does not have"),
    Rule(
        "warning",
        "geo_mean",
        lambda f: f.geo_mean_is_cut,
        "verl's geo_mean multiplies the gradient by the number of micro-batches per mini-batch",
        f"set {ACTOR}.use_dynamic_bsz=true {ACTOR}.ppo_max_token_len_per_gpu=100000000",
    ),
    # Rollout correction.
    Rule("error", "rollout_correction", lambda f: f.correction_error, "{found}", f"correct it under {CORRECTION}"),
    Rule(
        "error",
        "rollout_correction",
        lambda f: f.bypass and not f.trainer.use_v1 and f.names_sspo,
        "with trainer.use_v1=false verl replaces loss_mode=sspo by its own loss bypass_mode",
        f"set trainer.use_v1=true, or {CORRECTION}.bypass_mode=false",
    ),
    Rule(
        "error",
        "rollout_correction",
        lambda f: f.bypass and not f.rollout.calculate_log_probs,
        "bypass_mode=true needs the log-probs of the rollout",
        f"set {ROLLOUT}.calculate_log_probs=true",
    ),
    Rule(
        "warning",
        "rollout_correction",
        lambda f: f.corrects and not f.bypass and not f.rollout.calculate_log_probs,
        "rollout_is and rollout_rs do nothing without the log-probs of the rollout",
        f"set {ROLLOUT}.calculate_log_probs=true",
    ),
    Rule(
        "warning",
        "bypass_mode",
        lambda f: f.unread_correction,
        "in bypass mode loss_mode={f.loss_mode} does not read {found}: only verl's own loss bypass_mode does",
        f"set {CORRECTION}.bypass_mode=false, or {CORRECTION}.rollout_is=null {CORRECTION}.rollout_rs=null "
        f"{CORRECTION}.loss_type=ppo_clip",
    ),
    Rule("ok", "rollout_correction", lambda f: f.sspo and f.correction_effect, "with SSPO it {found}"),
    # Batches.
    Rule(
        "error",
        "batch_size",
        lambda f: f.data.train_batch_size % min(f.actor.ppo_mini_batch_size, f.data.train_batch_size),
        "data.train_batch_size={f.data.train_batch_size} is no multiple of ppo_mini_batch_size="
        "{f.actor.ppo_mini_batch_size}: verl fills the last mini-batch with empty rows",
        "make it a multiple",
    ),
    Rule(
        "error",
        "batch_size",
        lambda f: f.mini_batch % f.ranks,
        "a mini-batch of {f.actor.ppo_mini_batch_size} prompts x {f.rollout.n} responses does not divide by {f.ranks} "
        "data-parallel ranks",
        f"change {ACTOR}.ppo_mini_batch_size or {ROLLOUT}.n",
    ),
    Rule(
        "error",
        "micro_batch_size",
        lambda f: f.missing_micro_batches,
        "no micro-batch size: {found} is not set",
        f"set {ACTOR}.use_dynamic_bsz=true",
    ),
    Rule(
        "error", "batch_size", lambda f: f.broken_micro_batch, "{found}", f"choose a divisor, or set {ACTOR}.use_dynamic_bsz=true"
    ),
    Rule(
        "error",
        "batch_size",
        lambda f: (
            rollout_gpus(f.config)
            and f.data.train_batch_size
            != f.trainer.v1.separate_async.parameter_sync_step * f.actor.ppo_mini_batch_size
        ),
        "data.train_batch_size={f.data.train_batch_size} is not trainer.v1.separate_async.parameter_sync_step="
        "{f.trainer.v1.separate_async.parameter_sync_step} times ppo_mini_batch_size={f.actor.ppo_mini_batch_size}, "
        "which separate_async demands",
        "change one of them",
    ),
    Rule(
        "error",
        "dynamic_batch_size",
        lambda f: f.actor.use_dynamic_bsz != f.rollout.log_prob_use_dynamic_bsz,
        "actor.use_dynamic_bsz={f.actor.use_dynamic_bsz} and rollout.log_prob_use_dynamic_bsz="
        "{f.rollout.log_prob_use_dynamic_bsz} must be equal",
        "set ROLLOUT.log_prob_use_dynamic_bsz={f.actor.use_dynamic_bsz}".replace("ROLLOUT", ROLLOUT),
    ),
    Rule(
        "error",
        "token_budget",
        lambda f: f.token_budgets,
        "the longest sequence, {f.longest} tokens, does not fit into a micro-batch",
        "set {found}",
    ),
    Rule(
        "warning",
        "group_size",
        lambda f: f.rollout.n == 1 and f.estimator in GROUP_ESTIMATORS and not f.distils_only,
        "rollout.n=1 is a group of one response: it has no baseline, the advantage is the reward",
        f"set {ROLLOUT}.n=8",
    ),
    # Processes and GPUs.
    Rule(
        "error",
        "parallelism",
        lambda f: f.broken_split,
        "{found} GPUs, and {f.world} do not divide into them",
        "change the parallel sizes, trainer.nnodes or trainer.n_gpus_per_node",
    ),
    Rule(
        "error",
        "context_parallel",
        lambda f: (f.engine.get("context_parallel_size") or 1) > 1 and f.engine.get("use_remove_padding") is False,
        "context_parallel_size={f.engine.context_parallel_size} raises in verl 0.9.1 unless sequences are packed",
        f"set {ACTOR}.megatron.use_remove_padding=true",
    ),
    Rule(
        "error",
        "gpus",
        lambda f: rollout_gpus(f.config) and f.ray.get("num_gpus") is not None and f.ray["num_gpus"] < f.wanted_gpus,
        "ray_kwargs.ray_init.num_gpus={f.ray[num_gpus]}, but trainer and rollout need {f.wanted_gpus}: verl would wait "
        "for ever",
        "set ray_kwargs.ray_init.num_gpus={f.wanted_gpus}, or on GPUs null",
    ),
    Rule(
        "error",
        "weight_transfer",
        lambda f: f.cpu_transfer_on_gpus,
        "checkpoint_engine.custom_backend_module={f.rollout.checkpoint_engine.custom_backend_module} needs "
        "trainer.device=cpu",
        f"on GPUs set {ROLLOUT}.checkpoint_engine.backend=nccl {ROLLOUT}.checkpoint_engine.custom_backend_module=null "
        "ray_kwargs.ray_init.num_gpus=null",
    ),
    Rule(
        "error",
        "cpu",
        lambda f: f.on_cpu and f.critic,
        "there is no critic on a CPU",
        "set algorithm.adv_estimator=sspo critic.enable=false",
    ),
    Rule(
        "error",
        "cpu",
        lambda f: f.on_cpu and f.reference and not f.lora,
        "there is no reference policy on a CPU, which KL terms need (with LoRA it is the model without adapters)",
        f"set {ACTOR}.use_kl_loss=false algorithm.use_kl_in_reward=false",
    ),
    Rule(
        "error",
        "cpu",
        lambda f: f.rollout.name == "hf" and f.lora and not (f.model.get("lora") or {}).get("merge"),
        "the rollout hf generates with LoRA only if the adapters are merged",
        "set actor_rollout_ref.model.lora.merge=true",
    ),
    # Sampling, rewards.
    Rule(
        "error",
        "sampling",
        lambda f: f.rollout.temperature is None or f.rollout.temperature <= 0,
        "training samples with temperature={f.rollout.temperature}: all responses of a group would be the same",
        f"set {ROLLOUT}.temperature=1.0; validation has its own val_kwargs.temperature",
    ),
    Rule(
        "warning",
        "sampling",
        lambda f: f.samples_from_another_policy,
        "training does not sample from the policy itself, so the importance ratio is biased",
        "set {found}; validation has its own val_kwargs",
    ),
    Rule(
        "warning",
        "validation",
        lambda f: (f.rollout.val_kwargs.n or 1) > 1 and not f.rollout.val_kwargs.do_sample,
        "val_kwargs.n={f.rollout.val_kwargs.n} without sampling repeats the same greedy answer",
        f"set {ROLLOUT}.val_kwargs.do_sample=true {ROLLOUT}.val_kwargs.temperature=1.0, or {ROLLOUT}.val_kwargs.n=1",
    ),
    Rule(
        "warning",
        "filter_groups",
        lambda f: f.filtered_by_another_buffer,
        "verl passes algorithm.filter_groups to its own replay buffers only, and a custom sampler replaces them",
        "set trainer.v1.sampler.custom_sampler.path=null trainer.v1.sampler.custom_sampler.name=null",
    ),
    Rule(
        "warning",
        "sandbox",
        lambda f: f.config.reward.custom_reward_function.path and f.config.reward.sandbox_fusion.url,
        "a custom reward function does not read reward.sandbox_fusion.url",
        "set +reward.custom_reward_function.reward_kwargs.sandbox_fusion_url={f.config.reward.sandbox_fusion.url} "
        "reward.sandbox_fusion.url=null",
    ),
)


def rule_findings(config: DictConfig) -> list[Finding]:
    """What the rules say about a configuration in which `schema` found no wrong value."""
    return [*_apply(Facts(config)), *interpreter_findings(config)]


def _apply(facts: Facts) -> Iterator[Finding]:
    for rule in RULES:
        if found := rule.when(facts):
            texts = (text.format(f=facts, found=found) for text in (rule.message, rule.remedy))
            yield Finding(rule.severity, rule.check, *texts)
