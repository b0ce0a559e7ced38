"""Everything of verl that this package touches, private things too: where verl changes, a sentence says what.

`INTERNALS` gets a line with every new import of verl; `test_the_table_is_complete` asks for it.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

import pytest
import torch
import verl  # noqa: F401  loads the plugin

REPOSITORY = Path(__file__).parents[2]


class Expectation(NamedTuple):
    """What is expected of something of verl, as the rest of a sentence; whether it is so, given its dotted name."""

    sentence: str
    holds: Callable[[str], bool]


class Internal(NamedTuple):
    """Something of verl, the file of ours that relies on it, and on what."""

    name: str
    used_by: str
    expected: Expectation


def source(name: str) -> str:
    """Of a module, which is not imported, or of a class or function."""
    try:
        spec = find_spec(name)
    except ModuleNotFoundError:
        spec = None
    if spec is not None and spec.origin:
        return Path(spec.origin).read_text()
    return textwrap.dedent(inspect.getsource(inspect.unwrap(resolve_name(name))))


# --- kinds of expectations ---------------------------------------------------------------------------------------


def exists() -> Expectation:
    return Expectation("to be there", lambda name: resolve_name(name) is not None)


def takes(*parameters: str) -> Expectation:
    def holds(name: str) -> bool:
        known = inspect.signature(resolve_name(name)).parameters.values()
        needed = {each.name for each in known if each.default is each.empty and each.kind not in _VARIADIC} - {"self"}
        return needed <= set(parameters) <= {each.name for each in known}

    return Expectation(f"to take {', '.join(parameters)} and to need nothing else", holds)


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def has(*attributes: str) -> Expectation:
    return Expectation(
        f"to have {', '.join(attributes)}",
        lambda name: all(hasattr(resolve_name(name), attribute) for attribute in attributes),
    )


def has_fields(*names: str) -> Expectation:
    def holds(name: str) -> bool:
        cls = resolve_name(name)
        return set(names) <= ({each.name for each in fields(cls)} if is_dataclass(cls) else set(cls.model_fields))

    return Expectation(f"to have the fields {', '.join(names)}", holds)


def maps(*keys: Any) -> Expectation:
    def holds(name: str) -> bool:
        mapping = resolve_name(name)
        return isinstance(mapping, dict) and all(key in mapping for key in keys)

    return Expectation(f"to be a dictionary with {', '.join(map(repr, keys))}", holds)


def says(*texts: str) -> Expectation:
    """For what is neither a name nor a signature: log lines, file names, environment variables."""
    return Expectation(
        f"to have {', '.join(map(repr, texts))} in its source",
        lambda name: all(text in source(name) for text in texts),
    )


# What is ours is named, not imported: if verl has changed, it may not be importable.


def calls(function: str, ours: str) -> Expectation:
    """Calls by keyword fit our function. What a call passes on as **kwargs is not seen."""

    def fits(call: ast.Call) -> bool:
        known = inspect.signature(resolve_name(ours)).parameters.values()
        needed = {each.name for each in known if each.default is each.empty and each.kind not in _VARIADIC} - {"self"}
        takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known)
        given = {keyword.arg for keyword in call.keywords if keyword.arg}
        return needed <= given and (takes_all or given <= {each.name for each in known})

    def holds(name: str) -> bool:
        found = [node for node in ast.walk(ast.parse(source(name))) if isinstance(node, ast.Call)]
        found = [call for call in found if f".{ast.unparse(call.func)}".endswith(f".{function}")]
        return bool(found) and all(map(fits, found))

    return Expectation(f"to call {function} with arguments of {ours}", holds)


def calls_methods(variable: str, ours: str) -> Expectation:
    def holds(name: str) -> bool:
        called = set(re.findall(rf"\b{variable}\.(\w+)\.remote\(", source(name)))
        return bool(called) and called <= set(dir(resolve_name(ours)))

    return Expectation(f"to call no method of a {variable} that {ours} lacks", holds)


def leaves_what_is_in(ours: str) -> Expectation:
    def holds(name: str) -> bool:
        abstract = resolve_name(name).__abstractmethods__
        return bool(abstract) and abstract <= set(vars(resolve_name(ours)))

    return Expectation(f"to leave nothing to its subclasses that {ours} lacks", holds)


def leaves(*methods: str) -> Expectation:
    return Expectation(
        f"to leave {', '.join(methods)} to its subclasses and nothing else",
        lambda name: resolve_name(name).__abstractmethods__ == set(methods),
    )


def returns(result: Any, *arguments: Any) -> Expectation:
    return Expectation(
        f"to return {result!r} for {', '.join(map(repr, arguments))}",
        lambda name: resolve_name(name)(*arguments) == result,
    )


# --- the table ---------------------------------------------------------------------------------------------------

PPO = "verl.trainer.ppo"
ROLLOUT = "verl.workers.rollout"
OURS = "verl_sspo"
HF = "verl_sspo.cpu.rollout.HF"

INTERNALS = [
    # Being loaded, and registering.
    Internal("verl", "plugin.py", says('entry_points(group="verl.plugins")', "VERL_USE_EXTERNAL_MODULES")),
    Internal(f"{PPO}.core_algos.register_policy_loss", "algorithm.py", takes("name")),
    Internal(f"{PPO}.core_algos.register_adv_est", "algorithm.py", takes("name_or_enum")),
    Internal(f"{PPO}.core_algos.POLICY_LOSS_REGISTRY", "doctor/rules.py", maps("sspo", "gspo", "sapo")),
    Internal(f"{PPO}.core_algos.ADV_ESTIMATOR_REGISTRY", "doctor/rules.py", maps("sspo", "grpo")),
    Internal(f"{PPO}.core_algos.get_policy_loss_fn", "objectives.py", takes("name")),
    Internal(f"{PPO}.core_algos.get_adv_estimator_fn", "benchmark/advantages.py", takes("name_or_enum")),
    # Loss and estimator as they are called.
    Internal(
        "verl.workers.utils.losses.ppo_loss",
        "algorithm.py",
        calls("policy_loss_fn", f"{OURS}.algorithm.compute_policy_loss_sspo"),
    ),
    Internal(
        "verl.workers.utils.losses.ppo_loss",
        "algorithm.py",
        says(*(f'global_batch_info["{key}"]' for key in ("dp_size", "batch_num_tokens", "global_batch_size"))),
    ),
    Internal(
        f"{PPO}.core_algos.agg_loss",
        "loss.py",
        takes(
            *("loss_mat", "loss_mask", "loss_agg_mode"),
            *("dp_size", "batch_num_tokens", "global_batch_size", "loss_scale_factor"),
        ),
    ),
    Internal(
        f"{PPO}.ray_trainer.compute_advantage",
        "algorithm.py",
        says('"token_level_rewards":', '"response_mask":', '"config":', '["index"]', "adv_estimator_fn(**adv_kwargs)"),
    ),
    Internal(
        "verl.utils.metric.reduce_metrics",
        "metrics.py",
        returns({"a_max": 3, "a_min": 1, "a": 2}, {"a_max": [1, 3], "a_min": [1, 3], "a": [1, 3]}),
    ),
    Internal(f"{PPO}.metric_utils", "report/summary.py", says('"critic/score/mean"', '"timing_s/')),
    # Configuration.
    Internal("verl.workers.config.PolicyLossConfig", "config.py", has_fields("loss_mode")),
    Internal(
        "verl.workers.config.ActorConfig",
        "algorithm.py",
        has_fields("policy_loss", "global_batch_info", "use_torch_compile", "loss_agg_mode", "loss_scale_factor"),
    ),
    Internal("verl.workers.config.FSDPActorConfig", "benchmark/losses.py", has_fields("global_batch_info")),
    Internal(
        "verl.workers.config.RolloutConfig",
        "embedded/rollout.py",
        has_fields(
            *("tensor_model_parallel_size", "data_parallel_size", "pipeline_model_parallel_size", "max_model_len"),
            *("max_num_seqs", "max_num_batched_tokens", "dtype", "load_format", "prompt_length", "response_length"),
            *("temperature", "top_k", "top_p", "seed", "repetition_penalty", "ignore_eos", "free_cache_engine"),
            "checkpoint_engine",
        ),
    ),
    Internal(
        "verl.workers.config.HFModelConfig",
        "embedded/rollout.py",
        has_fields("hf_config", "generation_config", "tokenizer", "local_path", "trust_remote_code"),
    ),
    Internal("verl.utils.config.omega_conf_to_dataclass", "embedded/rollout.py", takes("config", "dataclass_type")),
    Internal(
        "verl.utils.config.validate_config",
        "doctor/configuration.py",
        takes("config", "use_reference_policy", "use_critic"),
    ),
    Internal(f"{PPO}.utils.need_critic", "doctor/configuration.py", takes("config")),
    Internal(
        f"{PPO}.rollout_corr_helper.compute_rollout_correction_and_rejection_mask",
        "doctor/rules.py",
        takes("old_log_prob", "rollout_log_prob", "response_mask", "rollout_is", "rollout_rs", "rollout_rs_threshold"),
    ),
    Internal(f"{PPO}.utils.need_reference_policy", "doctor/configuration.py", takes("config")),
    # The platform `cpu`.
    Internal("verl.plugin.platform.PlatformRegistry", "embedded/__init__.py", has("register", "registered_names")),
    Internal(
        "verl.plugin.platform.PlatformBase",
        "embedded/platform.py",
        leaves_what_is_in(f"{OURS}.embedded.platform.PlatformCPU"),
    ),
    Internal("verl.plugin.platform.PlatformBase.is_platform_available", "embedded/__init__.py", takes("use_smi_check")),
    Internal("verl.plugin.platform.platform_manager", "embedded/internals.py", has("_current_platform")),
    Internal("verl.plugin.platform.platform_manager", "embedded/__init__.py", says('"VERL_PLATFORM"')),
    Internal("verl.workers.engine.base", "embedded/__init__.py", says('os.getenv("VERL_ENGINE_DEVICE")')),
    Internal("verl.utils.distributed", "embedded/internals.py", has("initialize_global_process_group_ray")),
    Internal(
        "verl.utils.distributed.initialize_global_process_group_ray",
        "embedded/internals.py",
        takes("timeout_second", "backend"),
    ),
    Internal(
        "verl.workers.engine_workers",
        "embedded/internals.py",
        says("from verl.utils.distributed import initialize_global_process_group_ray"),
    ),
    # The rollout `hf`.
    Internal(f"{ROLLOUT}.base", "embedded/internals.py", has("_ROLLOUT_REGISTRY", "get_rollout_class")),
    Internal(f"{ROLLOUT}.base._ROLLOUT_REGISTRY", "embedded/internals.py", maps(("vllm", "async"))),
    Internal(f"{ROLLOUT}.base.BaseRollout", "embedded/rollout.py", leaves("resume", "release", "update_weights")),
    Internal("verl.workers.engine_workers", "embedded/rollout.py", calls("rollout_cls", f"{HF}ServerAdapter.__init__")),
    Internal(f"{ROLLOUT}.replica.RolloutReplicaRegistry", "embedded/internals.py", has("register", "get")),
    Internal(f"{ROLLOUT}.replica.RolloutReplicaRegistry.register", "embedded/internals.py", takes("name", "loader")),
    Internal(f"{ROLLOUT}.replica.RolloutReplica", "embedded/rollout.py", leaves("launch_servers")),
    Internal(f"{ROLLOUT}.replica.RolloutReplica", "embedded/rollout.py", calls_methods("server", f"{HF}Server")),
    Internal(
        f"{ROLLOUT}.replica.RolloutReplica.__init__",
        "embedded/rollout.py",
        says(*(f"self.{name}" for name in ("config", "rollout_mode", "workers", "servers", "_server_handle"))),
    ),
    Internal(f"{ROLLOUT}.llm_server", "embedded/rollout.py", calls("rollout_replica_class", f"{HF}Replica.__init__")),
    Internal(f"{ROLLOUT}.llm_server", "embedded/rollout.py", calls("server.generate.remote", f"{HF}Server.generate")),
    Internal(f"{ROLLOUT}.llm_server", "embedded/rollout.py", says('.get("global_steps")', "_server_address")),
    Internal(f"{ROLLOUT}.replica.RolloutMode", "embedded/rollout.py", has("HYBRID", "COLOCATED", "STANDALONE")),
    Internal(
        f"{ROLLOUT}.replica.TokenOutput",
        "embedded/rollout.py",
        has_fields("token_ids", "log_probs", "stop_reason", "extra_fields"),
    ),
    Internal(f"{ROLLOUT}.utils.ensure_async_iterator", "embedded/rollout.py", takes("iterable")),
    Internal("verl.utils.normalize_token_ids", "embedded/rollout.py", returns([1, 2], [1, 2])),
    Internal("verl.utils.torch_dtypes.PrecisionType", "embedded/rollout.py", has("to_dtype")),
    Internal("verl.utils.torch_dtypes.PrecisionType.to_dtype", "embedded/rollout.py", returns(torch.half, "float16")),
    # Weights on their way to the rollout.
    Internal(
        "verl.checkpoint_engine.CheckpointEngine",
        "embedded/weights.py",
        leaves_what_is_in(f"{OURS}.embedded.weights.GlooCheckpointEngine"),
    ),
    Internal("verl.checkpoint_engine.CheckpointEngineRegistry", "embedded/weights.py", has("register", "get")),
    Internal("verl.checkpoint_engine.CheckpointEngineManager", "embedded/weight_sync.py", has("update_weights")),
    Internal(
        "verl.checkpoint_engine.CheckpointEngineManager.update_weights",
        "embedded/weight_sync.py",
        takes("global_steps"),
    ),
    Internal(
        "verl.checkpoint_engine.base",
        "embedded/weights.py",
        says("import_external_libs(self.config.custom_backend_module or None)"),
    ),
    Internal("verl.utils.ray_utils.auto_await", "embedded/weight_sync.py", takes("func")),
    Internal("verl.utils.fsdp_utils", "embedded/internals.py", has("fsdp2_sharded_save_to_cpu")),
    Internal("verl.utils.fsdp_utils.fsdp2_sharded_save_to_cpu", "embedded/internals.py", takes("model")),
    Internal(
        "verl.experimental.separation.engine_workers",
        "embedded/internals.py",
        says("            from verl.utils.fsdp_utils import (\n                fsdp2_sharded_load_from_cpu"),
    ),
    # Trainer, its log and its files.
    Internal(f"{PPO}.v1.replay_buffer.ReplayBuffer", "embedded/sampler.py", has("sample")),
    Internal(f"{PPO}.v1.replay_buffer.ReplayBuffer.__init__", "embedded/sampler.py", says("poll_interval: float")),
    Internal(f"{PPO}.v1.replay_buffer.ReplayBufferAsync", "embedded/sampler.py", has("sample")),
    Internal(
        f"{PPO}.v1.trainer_base",
        "embedded/sampler.py",
        says("load_extern_type(custom_sampler.path, custom_sampler.name)", "trainer_mode=self.trainer_mode"),
    ),
    Internal("verl.trainer.main_ppo", "launch.py", says("ray init kwargs", 'if __name__ == "__main__"')),
    Internal(f"{PPO}.v1.trainer_base", "launch.py", says("Total training steps: {")),
    Internal(
        "verl.utils.tracking.FileLogger",
        "launch.py",
        says('"VERL_FILE_LOGGER_PATH"', "Creating file logger", '{"step": step, "data": data}'),
    ),
    Internal(
        f"{PPO}.v1.trainer_base",
        "doctor/environment.py",
        says('"latest_checkpointed_iteration.txt"', 'f"global_step_{self.global_steps}"', '"actor"', '"data.pt"'),
    ),
    Internal(
        f"{PPO}.v1.trainer_base",
        "evaluation.py",
        says('f"{global_steps}.jsonl"', *(f'"{key}":' for key in ("input", "output", "gts", "score", "uid"))),
    ),
    # Rewards.
    Internal(
        "verl.experimental.reward_loop.reward_manager.naive",
        "rewards/__init__.py",
        calls("compute_score", f"{OURS}.rewards.compute_score"),
    ),
    Internal("verl.utils.import_utils", "rewards/__init__.py", says('PKG_PATH_PREFIX = "pkg://"')),
    Internal("verl.utils.reward_score.sandbox_fusion", "rewards/code.py", has("check_correctness")),
    Internal(
        "verl.utils.reward_score.sandbox_fusion.check_correctness",
        "rewards/code.py",
        takes(
            *("sandbox_fusion_url", "in_outs", "generation", "timeout", "memory_limit_mb", "language"),
            "concurrent_semaphore",
        ),
    ),
    Internal("verl.utils.reward_score.prime_code", "benchmark/sandbox.py", has("compute_score")),
]


@pytest.mark.parametrize(
    ("name", "used_by", "expected"), INTERNALS, ids=[f"{i}-{each.name}" for i, each in enumerate(INTERNALS)]
)
def test_verl_is_as_we_expect(name, used_by, expected):
    sentence = f"verl {version('verl')} has changed: verl_sspo/{used_by} expects {name} {expected.sentence}"
    assert (REPOSITORY / "verl_sspo" / used_by).is_file(), f"{used_by} is gone: remove its line for {name}"
    try:
        holds = expected.holds(name)
    except (ImportError, AttributeError, OSError) as error:
        pytest.fail(f"{sentence}, but {error}", pytrace=False)
    if not holds:
        pytest.fail(sentence, pytrace=False)


def _names_of_verl(path: Path) -> set[str]:
    """What a file imports from verl, and dotted names of verl that it has as text."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{each.name}" for each in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names |= set(re.findall(r"^verl(?:\.\w+)+$", node.value))
    return {name for name in names if name.split(".")[0] == "verl"}


def test_the_table_is_complete():
    files = [*(REPOSITORY / "verl_sspo").rglob("*.py"), *(REPOSITORY / "scripts").glob("*.py")]
    used = {name: path for path in files for name in _names_of_verl(path)}
    missing = {name: str(path.relative_to(REPOSITORY)) for name, path in used.items()}
    for internal in INTERNALS:
        missing.pop(internal.name, None)
    assert not missing, "these names of verl need a line in INTERNALS"
    assert used, "nothing was read"


def test_the_replay_buffer_is_made_as_verl_makes_it():
    from verl_sspo.cpu.sampler import quick_replay_buffer

    options = {"trainer_config": {}, "max_off_policy_threshold": 1, "max_off_policy_strategy": "drop"}
    buffer = quick_replay_buffer(trainer_mode="sync", sampler_kwargs={}, refill_fn=None, **options)
    assert buffer.poll_interval < 1
