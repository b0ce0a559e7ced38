"""Every recipe composes, is accepted by verl, and passes the doctor's checks."""

import itertools
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import verl  # noqa: F401  loads the plugin
import yaml
from omegaconf import OmegaConf
from verl.utils.config import omega_conf_to_dataclass

from verl_sspo.compose import compose_config, verl_config_dir
from verl_sspo.doctor.configuration import configuration_findings

RECIPES = Path(__file__).parents[2] / "recipes"
TASKS = ("gsm8k", "math", "gsm8k_deepmath", "code")
ALGORITHMS = ("sspo", "sspo_v1", "sspo_forward", "sspo_sequence", "grpo", "dr_grpo", "gspo", "gmpo", "sapo")
FSDP = {
    "fsdp_1gpu": ("qwen2.5_0.5b_instruct", "qwen2.5_1.5b_instruct", "qwen3_4b", "qwen2.5_1.5b_instruct"),
    "fsdp_8gpu": ("qwen2.5_7b_instruct", "qwen2.5_math_7b", "qwen3_8b", "qwen2.5_7b_instruct"),
    "multinode": ("qwen3_8b", "qwen2.5_math_7b", "qwen2.5_7b_instruct", "qwen3_4b"),
}
MEGATRON = {
    "megatron_8gpu": ("qwen2.5_7b_instruct", "qwen2.5_math_7b", "qwen3_8b", "qwen3_4b"),
    "megatron_moe": ("qwen3_30b_a3b",) * 4,
}


def _combinations():
    """Every task on every hardware, so that each algorithm runs on both engines and every model is used."""
    for family in (FSDP, MEGATRON):
        places = list(itertools.product(family.items(), TASKS))
        for i in range(max(len(places), len(ALGORITHMS))):
            (hardware, models), task = places[i % len(places)]
            yield task, ALGORITHMS[i % len(ALGORITHMS)], hardware, models[i % len(models)]


COMBINATIONS = list(_combinations())


@lru_cache
def _compose(task, *overrides):
    return compose_config(task, overrides, RECIPES)


def test_combinations_use_every_file():
    used = [set(column) for column in zip(*COMBINATIONS, strict=True)]
    shared = {"gpu", "megatron", "base"}
    for group, names in zip(("algo", "hardware", "model"), used[1:], strict=True):
        files = {path.stem for path in (RECIPES / group).glob("*.yaml")}
        assert files - names - shared <= {"cpu", "cpu_bf16", "cpu_vllm", "gpu_hf", "smollm2_135m", "tiny"}, group
    assert {(a, h in FSDP) for _, a, h, _ in COMBINATIONS} == set(itertools.product(ALGORITHMS, (True, False)))


def test_no_recipe_has_the_name_of_a_file_of_verl():
    ours, verls = ({path.relative_to(root) for path in root.rglob("*.yaml")} for root in (RECIPES, verl_config_dir()))
    assert ours
    assert ours & verls == set()


@pytest.mark.parametrize(("task", "algorithm", "hardware", "model"), COMBINATIONS)
def test_recipe_is_sound(task, algorithm, hardware, model):
    config = compose_config(task, [f"algo={algorithm}", f"hardware={hardware}", f"model={model}"], RECIPES)
    assert configuration_findings(config) == []
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    engine = "McoreActorConfig" if hardware in MEGATRON else "FSDPActorConfig"
    assert type(actor).__name__ == engine
    assert config.trainer.experiment_name == algorithm
    # Off-policy, as in the papers: several updates per rollout.
    updates = config.data.train_batch_size // actor.ppo_mini_batch_size * actor.ppo_epochs
    assert updates == (2 if task == "gsm8k_deepmath" else 4)


@pytest.mark.parametrize("hardware", ["cpu", "cpu_vllm"])
@pytest.mark.parametrize("task", TASKS)
def test_recipe_is_sound_without_a_gpu(task, hardware):
    assert configuration_findings(_compose(task, f"hardware={hardware}", "model=tiny")) == []


@pytest.mark.parametrize("task", [*TASKS, "quickstart", "word_problems"])
def test_recipe_is_sound_on_one_gpu_without_vllm(task):
    models = ["model=qwen2.5_0.5b_instruct"] if task in TASKS else []
    config = _compose(task, "hardware=gpu_hf", *models)
    assert configuration_findings(config) == []
    rollout = omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
    engine = omega_conf_to_dataclass(config.actor_rollout_ref.actor).fsdp_config
    assert (rollout.name, rollout.dtype, rollout.free_cache_engine) == ("hf", "bfloat16", True)
    assert (engine.strategy, engine.param_offload, engine.optimizer_offload) == ("fsdp2", True, True)
    assert engine.mixed_precision["param_dtype"] == "bfloat16"
    assert config.trainer.device == "cuda"


def test_cpu_vllm_is_cpu_with_another_rollout():
    cpu, vllm = (OmegaConf.to_container(_compose("quickstart", f"hardware={name}")) for name in ("cpu", "cpu_vllm"))
    cpu, vllm = dict(_flat(cpu)), dict(_flat(vllm))
    differs = {key for key in cpu.keys() | vllm.keys() if cpu.get(key) != vllm.get(key)}
    where = ("actor_rollout_ref.rollout.", "ray_kwargs.ray_init.runtime_env.env_vars.")
    assert [key for key in differs if not key.startswith(where)] == []
    assert vllm["actor_rollout_ref.rollout.name"] == "vllm"


def test_quickstart_is_sound():
    assert configuration_findings(_compose("quickstart")) == []


@pytest.mark.parametrize("task", [*TASKS, "quickstart"])
def test_a_restart_goes_on(task):
    assert _compose(task).trainer.resume_mode == "auto"


#: The keys that an algorithm's recipe may set. Other keys would change more than the algorithm in a comparison.
OF_THE_ALGORITHM = (
    "algorithm.adv_estimator",
    "algorithm.norm_adv_by_std_in_grpo",
    "algorithm.sspo.",
    "actor_rollout_ref.actor.policy_loss.",
    "actor_rollout_ref.actor.loss_agg_mode",
    "actor_rollout_ref.actor.loss_scale_factor",
    "actor_rollout_ref.actor.clip_ratio",
    "actor_rollout_ref.actor.tau_",
    "trainer.experiment_name",
)
#: geo_mean's sums depend on the micro-batches; see recipes/algo/gmpo.yaml.
OF_GMPO = ("actor_rollout_ref.actor.use_dynamic_bsz", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu")


def _flat(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_algorithm_changes_the_algorithm_alone(algorithm):
    content = yaml.safe_load((RECIPES / "algo" / f"{algorithm}.yaml").read_text())
    parents = [name for name in content.pop("defaults", []) if name != "_self_"]
    own = dict(_flat(content))
    allowed = OF_THE_ALGORITHM + (OF_GMPO if algorithm == "gmpo" else ())
    assert [key for key in own if not key.startswith(allowed)] == []
    for parent in parents:
        own = {**dict(_flat(yaml.safe_load((RECIPES / "algo" / f"{parent}.yaml").read_text()))), **own}
    # If one algorithm changes a default of verl, all algorithms set that key.
    resets = {
        "algorithm.adv_estimator",
        "algorithm.norm_adv_by_std_in_grpo",
        "actor_rollout_ref.actor.policy_loss._target_",
        "actor_rollout_ref.actor.policy_loss.loss_mode",
        "actor_rollout_ref.actor.loss_agg_mode",
        "actor_rollout_ref.actor.loss_scale_factor",
        *(f"actor_rollout_ref.actor.clip_ratio{end}" for end in ("", "_low", "_high", "_c")),
    }
    assert resets <= own.keys()


def test_published_hyperparameters_arrive():
    def actor(algorithm):
        return omega_conf_to_dataclass(_compose("math", f"algo={algorithm}").actor_rollout_ref.actor)

    gspo, gmpo, sapo, dr_grpo = actor("gspo"), actor("gmpo"), actor("sapo"), actor("dr_grpo")
    assert (gspo.clip_ratio_low, gspo.clip_ratio_high) == (3e-4, 4e-4)
    assert (gmpo.clip_ratio_low, gmpo.clip_ratio_high) == (0.4, 0.4)
    assert (sapo.tau_pos, sapo.tau_neg) == (1.0, 1.05)
    assert (dr_grpo.loss_agg_mode, dr_grpo.loss_scale_factor) == ("seq-mean-token-sum-norm", 3072)
    v3, v1, forward = actor("sspo").policy_loss, actor("sspo_v1").policy_loss, actor("sspo_forward").policy_loss
    assert (v3.gate, v3.gate_domain, v3.tau_pos, v3.tau_neg, v3.gate_side) == ("arctan", "log", 10.0, 12.0, "both")
    assert (v1.gate, v1.gate_domain, v1.tau_pos, v1.tau_neg, v1.gate_side) == ("sigmoid", "ratio", 1.0, 1.05, "both")
    assert (forward.gate, forward.tau_pos, forward.gate_side) == ("arctan", 10.0, "forward")
    sequence = actor("sspo_sequence").policy_loss
    assert (sequence.gate, sequence.tau_pos, sequence.tau_neg) == ("erf", 100.0, 100.0)
    assert (sequence.gate_side, sequence.gate_level) == ("forward", "sequence")


def test_main_ppo_composes_the_same():
    arguments = ["hardware=megatron_8gpu", "algo=sspo_v1", "data.train_batch_size=512"]
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-dir", str(RECIPES), "--config-name", "gsm8k"]
    run = subprocess.run([*command, *arguments, "--cfg", "job"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    printed = run.stdout[run.stdout.index("model_engine:") :]
    assert yaml.safe_load(printed) == yaml.safe_load(OmegaConf.to_yaml(_compose("gsm8k", *arguments)))
