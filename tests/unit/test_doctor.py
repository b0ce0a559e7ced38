"""The doctor: its findings about configurations, machines and files, and its command line."""

import copy
import json
import math
import re
import sys
import textwrap
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import fresh_process
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import verl  # noqa: F401  loads the plugin
from datasets import load_dataset
from omegaconf import OmegaConf
from transformers import AutoConfig
from verl.utils.config import omega_conf_to_dataclass

from verl_sspo.algorithm.description import describe, half_width
from verl_sspo.algorithm.gates import Gate
from verl_sspo.compose import compose_config
from verl_sspo.cpu import instructions as instructions_of_the_cpu
from verl_sspo.data.schema import make_row, write_rows
from verl_sspo.doctor import environment, memory
from verl_sspo.doctor.command import main
from verl_sspo.doctor.configuration import configuration_findings
from verl_sspo.doctor.rules import Facts
from verl_sspo.run import settings

REPOSITORY = Path(__file__).parents[2]
RECIPES = REPOSITORY / "recipes"
LINES = REPOSITORY.parent / "shared" / "cases" / "command_lines.jsonl"
ACTOR, ROLLOUT, MODEL = (f"actor_rollout_ref.{name}" for name in ("actor", "rollout", "model"))
LOSS, CORRECTION = f"{ACTOR}.policy_loss", "algorithm.rollout_correction"
#: The overrides that docs/migrate.md adds to any verl command line.
MIGRATION = ["algorithm.adv_estimator=sspo", f"{LOSS}.loss_mode=sspo", f"{ACTOR}.loss_agg_mode=seq-mean-token-mean"]
#: A plain verl command line.
PLAIN = ["algorithm.adv_estimator=grpo", "data.train_batch_size=1024", f"{ACTOR}.use_dynamic_bsz=true"]
PLAIN += [f"{ROLLOUT}.name=vllm", f"{ROLLOUT}.n=8"]


@lru_cache
def _recipe(*groups):
    return compose_config("gsm8k", groups, RECIPES)


def _changed(*overrides):
    """The recipe gsm8k with overrides. Hydra composes only the choices of groups: merging the rest is faster."""
    groups = [text for text in overrides if text.partition("=")[0] in ("algo", "hardware", "model")]
    config = copy.deepcopy(_recipe(*groups))
    OmegaConf.set_struct(config, False)
    return OmegaConf.merge(
        config, OmegaConf.from_dotlist([text.lstrip("+") for text in overrides if text not in groups])
    )


def _checks(findings, *severities):
    return {finding.check for finding in findings if finding.severity in (severities or ("error", "warning"))}


def _said(findings, check):
    return "\n".join(finding.message for finding in findings if finding.check == check)


# --- errors are found, in one line, with a remedy that works when pasted -------------------------------------------

BROKEN = [
    # verl ignores or rejects these
    (["+actor_rollout_ref.actor.clip_ratio_lo=0.1"], "error", "unknown_key"),
    (["+algorithm.normalise=true"], "error", "unknown_key"),
    (["+data.max_lenght=3"], "error", "unknown_key"),
    (["+staleness=bypass"], "error", "unknown_key"),  # a plain key if the recipes are not found
    (["+actor_rollout_ref.actor.policy_loss.tau=3"], "error", "verl"),
    (["algo=gspo", f"{LOSS}.loss_mode=sspo", f"{LOSS}.tau_pos=3"], "error", "unknown_key"),
    (["hardware=megatron_8gpu", "+actor_rollout_ref.actor.megatron.grad_offloading=true"], "error", "unknown_key"),
    (["custom_reward_function.path=rewards.py"], "error", "legacy"),
    (["reward_model.reward_manager=dapo"], "error", "legacy"),
    (["sandbox_fusion.url=http://x"], "error", "legacy"),
    ([f"{ACTOR}.loss_agg_mode=mean"], "error", "verl"),
    ([f"{MODEL}.path=${{data.nowhere}}"], "error", "interpolation"),
    ([f"{LOSS}.loss_mode=ssppo"], "error", "registered"),
    (["algorithm.adv_estimator=gprpo"], "error", "registered"),
    ([f"{LOSS}._target_=verl_sspo.config.SSPOPolicy"], "error", "class"),
    (["algorithm._target_=verl.trainer.config.AlgorithmConfig"], "error", "class"),
    (["reward._target_=null"], "error", "class"),
    # SSPO is not the algorithm that it seems to be
    ([f"{LOSS}.loss_mode=gspo"], "error", "gate_unused"),
    ([f"{LOSS}.gate=tanh"], "error", "gate"),
    ([f"{LOSS}.tau_pos=0"], "error", "gate"),
    ([f"{LOSS}.tau_neg=-1"], "error", "gate"),
    ([f"{LOSS}.tau_neg=1000"], "warning", "temperature"),
    ([f"{LOSS}.gate_level=response"], "error", "gate"),
    ([f"{LOSS}.tau_pos=1.0", f"{LOSS}.tau_neg=1.05"], "warning", "temperature"),
    (["algorithm.sspo.basline=mean"], "error", "estimator"),
    (["algorithm.sspo.baseline=median"], "error", "estimator"),
    (["algorithm.sspo.baseline=leave_one_out", "algorithm.adv_estimator=grpo"], "warning", "estimator"),
    (["algorithm.adv_estimator=rloo"], "warning", "estimator"),
    ([f"{ACTOR}.clip_ratio_high=0.28"], "warning", "unread"),
    ([f"{ACTOR}.tau_pos=10"], "warning", "unread"),
    ([f"{LOSS}.kl_cov_ratio=0.1"], "warning", "unread"),
    (["algo=grpo", f"{LOSS}.clip_cov_ratio=0.1"], "warning", "unread"),
    (["+algorithm.gdpo_reward_keys=[acc]"], "warning", "unread"),
    ([f"{ACTOR}.loss_agg_mode=token-mean"], "warning", "aggregation"),
    (["algo=sapo", f"{ACTOR}.loss_agg_mode=token-mean"], "warning", "aggregation"),
    (["distillation.enabled=true", "distillation.distillation_loss.use_task_rewards=false"], "warning", "distillation"),
    (["data.train_batch_size=64"], "warning", "on_policy"),
    # rollout correction
    ([f"{CORRECTION}.rollout_is=tokens"], "error", "rollout_correction"),
    ([f"{CORRECTION}.rollout_is=token", f"{CORRECTION}.rollout_is_threshold='5.0_0.5'"], "error", "rollout_correction"),
    ([f"{CORRECTION}.rollout_rs=seq_mean_k1"], "error", "rollout_correction"),
    ([f"{CORRECTION}.rollout_is=token", f"{ROLLOUT}.calculate_log_probs=false"], "warning", "rollout_correction"),
    ([f"{CORRECTION}.bypass_mode=true", f"{ROLLOUT}.calculate_log_probs=false"], "error", "rollout_correction"),
    ([f"{CORRECTION}.bypass_mode=true", "trainer.use_v1=false"], "error", "rollout_correction"),
    ([f"{CORRECTION}.bypass_mode=true", f"{CORRECTION}.rollout_is=token"], "warning", "bypass_mode"),
    # batches
    (["data.train_batch_size=250"], "error", "batch_size"),
    ([f"{ROLLOUT}.n=5", f"{ACTOR}.ppo_mini_batch_size=2"], "error", "batch_size"),
    ([f"{ACTOR}.use_dynamic_bsz=false", f"{ACTOR}.ppo_micro_batch_size_per_gpu=3"], "error", "batch_size"),
    ([f"{ACTOR}.use_dynamic_bsz=false"], "error", "micro_batch_size"),
    ([f"{ROLLOUT}.log_prob_use_dynamic_bsz=false"], "error", "dynamic_batch_size"),
    (["data.max_response_length=30000"], "error", "token_budget"),
    (["algo=gmpo", f"{ACTOR}.ppo_max_token_len_per_gpu=24576"], "warning", "geo_mean"),
    ([f"{ROLLOUT}.n=1"], "warning", "group_size"),
    # processes
    ([f"{ROLLOUT}.tensor_model_parallel_size=3"], "error", "parallelism"),
    (["hardware=megatron_moe", f"{ACTOR}.megatron.expert_model_parallel_size=16"], "error", "parallelism"),
    (
        ["hardware=megatron_8gpu", f"{ACTOR}.megatron.context_parallel_size=2", f"{MODEL}.use_remove_padding=false"],
        "error",
        "context_parallel",
    ),
    (["hardware=cpu", "algorithm.adv_estimator=gae"], "error", "cpu"),
    (["hardware=cpu", f"{ACTOR}.use_kl_loss=true"], "error", "cpu"),
    (["hardware=cpu", "algorithm.use_kl_in_reward=true"], "error", "cpu"),
    (["hardware=cpu", f"{MODEL}.lora_rank=8"], "error", "cpu"),
    (['ray_kwargs.ray_init.runtime_env.py_executable="uv -v run --frozen"'], "warning", "py_executable"),
    # sampling, rewards
    ([f"{ROLLOUT}.temperature=0"], "error", "sampling"),
    ([f"{ROLLOUT}.temperature=-1.0"], "error", "sampling"),
    ([f"{ROLLOUT}.top_p=0.95"], "warning", "sampling"),
    ([f"{ROLLOUT}.top_k=20", f"{ROLLOUT}.do_sample=false"], "warning", "sampling"),
    ([f"{ROLLOUT}.val_kwargs.n=4"], "warning", "validation"),
    (["reward.sandbox_fusion.url=http://x"], "warning", "sandbox"),
    (
        ["algorithm.filter_groups.enable=true", "trainer.v1.sampler.custom_sampler={path: x.py, name: X}"],
        "warning",
        "filter_groups",
    ),
]


@pytest.mark.parametrize(
    ("overrides", "severity", "check"), BROKEN, ids=[f"{c}-{i}" for i, (*_, c) in enumerate(BROKEN)]
)
def test_what_is_wrong_is_found(overrides, severity, check):
    findings = configuration_findings(_changed(*overrides))
    found = [finding for finding in findings if (finding.severity, finding.check) == (severity, check)]
    # One finding per cause.
    assert len(found) == 1, findings
    assert found[0].remedy
    assert "\n" not in str(found[0])
    # The setting that the remedy names removes the finding.
    remedy = re.split(r", | or |; ", found[0].remedy)[0]
    if remedy.startswith("set ") and "=" in remedy and not remedy.startswith("set reward."):
        pasted = _changed(*overrides, *(word for word in remedy.split() if "=" in word))
        assert not [each for each in configuration_findings(pasted) if (each.severity, each.check) == (severity, check)]


FINE = [
    [f"{CORRECTION}.rollout_is=token", f"{CORRECTION}.rollout_is_threshold='0.5_5.0'"],
    ["algorithm.rollout_correction=null"],
    ["algorithm.filter_groups=null"],
    [f"{ROLLOUT}.temperature=0.7"],  # verl scales the actor's logits too
    ["data.seed=null"],
    [f"{ACTOR}.use_kl_loss=true"],
    [f"{CORRECTION}.bypass_mode=true"],
    [f"{MODEL}.lora_rank=8"],  # without vLLM installed
    ["algorithm.adv_estimator=grpo"],  # with SSPO's defaults, which do what grpo does
    [f"{LOSS}.gate=sigmoid", f"{LOSS}.gate_domain=ratio", f"{LOSS}.tau_pos=1.0", f"{LOSS}.tau_neg=1.05"],
    [
        "hardware=cpu",
        "model=tiny",
        f"{MODEL}.lora_rank=8",
        "+actor_rollout_ref.model.lora.merge=true",
        f"{ACTOR}.use_kl_loss=true",
    ],
    ["hardware=megatron_8gpu", f"{ACTOR}.megatron.context_parallel_size=2"],
    ["hardware=megatron_8gpu", "+actor_rollout_ref.ref.megatron.override_transformer_config.my_key=1"],
    ["hardware=cpu", "model=tiny", "algorithm.filter_groups.enable=true"],
    ["algo=grpo", f"{ACTOR}.clip_ratio_high=0.28", f"{ACTOR}.clip_ratio_c=10"],
]


@pytest.mark.parametrize("overrides", FINE, ids=str)
def test_what_verl_accepts_is_accepted(overrides):
    assert _checks(configuration_findings(_changed(*overrides))) == set()


@pytest.mark.parametrize(
    ("key", "engine"),
    [
        ("ulysses_sequence_parallel_size", "dp"),
        ("fsdp_config.ulysses_sequence_parallel_size", "dp"),
        ("veomni.ulysses_parallel_size", "veomni"),
        ("megatron.context_parallel_size", "megatron"),
    ],
)
def test_a_sequence_over_several_ranks(key, engine):
    lengths = ["data.max_prompt_length=2048", "data.max_response_length=8192"]
    budgets = [f"{ACTOR}.ppo_max_token_len_per_gpu=2560", f"{ROLLOUT}.log_prob_max_token_len_per_gpu=2560"]
    config = compose_config("ppo_trainer", [*PLAIN, *lengths, *budgets, f"model_engine={engine}", f"{ACTOR}.{key}=4"])
    # 4 x 2560 tokens hold the longest sequence of 10240, and 8 GPUs are 2 data-parallel ranks.
    assert _checks(configuration_findings(config), "error") == set()
    assert Facts(config).ranks == 2
    config.data.max_response_length = 8193
    assert _checks(configuration_findings(config), "error") == {"token_budget"}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rollout_is=token"], ("geometric mean", "0.61", "truncates the weights of tokens at 2.0")),
        (["rollout_is=token", "rollout_is_threshold='0.5_5.0'"], ("leaves out tokens", "0.5_5.0", "weight 0")),
        (["rollout_is=sequence", "rollout_is_batch_normalize=true"], ("truncates the weights of responses",)),
        (["rollout_is=sequence", "rollout_is_threshold='0.5_5.0'"], ("leaves out responses",)),
        (["rollout_rs=seq_mean_k1", "rollout_rs_threshold='0.9_1.1'"], ("rejects by mask", "seq_mean_k1", "0.9_1.1")),
        (["bypass_mode=true"], ("the rollout's lag", "calculate_entropy=true")),
    ],
)
def test_the_effect_of_a_rollout_correction_is_told_once(overrides, said):
    findings = configuration_findings(_changed(*(f"{CORRECTION}.{each}" for each in overrides)))
    (finding,) = (each for each in findings if each.check == "rollout_correction")
    assert finding.severity == "ok"
    assert all(part in finding.message for part in said)
    assert not _checks(findings)


def test_context_parallelism_is_as_the_doctor_says(tmp_path):
    """verl's own code, with Megatron as a mock: padded sequences raise, packed ones do not."""
    program = """
        import importlib.machinery, sys
        from unittest.mock import MagicMock
        import torch

        class Mocked:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("megatron", "mbridge", "transformer_engine"):
                    return importlib.machinery.ModuleSpec(name, self, is_package=True)
            def create_module(self, spec):
                return MagicMock(name=spec.name, __path__=[], __spec__=spec, __version__="0.16.0")
            def exec_module(self, module):
                pass

        sys.meta_path.insert(0, Mocked())
        from tensordict import TensorDict
        from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead as Engine

        def run(packed):
            engine = MagicMock()
            engine.engine_config.use_remove_padding, engine.engine_config.context_parallel_size = packed, 2
            engine.engine_config.dynamic_context_parallel = False
            engine._routed_num_tokens.return_value = torch.tensor(4)
            engine.prepare_model_outputs.return_value = {}
            data = TensorDict({"input_ids": torch.ones(1, 4), "num_micro_batch": torch.ones(1)}, batch_size=[1])
            return Engine.postprocess_micro_batch_func(
                engine, {}, data, False, lambda **kwargs: (torch.tensor(1.0, requires_grad=True), {})
            )

        assert len(run(packed=True)) == 3
        try:
            run(packed=False)
        except ValueError as error:
            assert "use_remove_padding=True" in str(error), error
        else:
            raise AssertionError("padded sequences do not raise")
        import inspect, verl.workers.engine_workers as workers
        assert "engine_config.use_remove_padding = model_config.get" in inspect.getsource(workers)
    """
    fresh_process.run(textwrap.dedent(program), tmp_path)


# --- whole command lines -------------------------------------------------------------------------------------------


def test_temperatures_of_tokens_and_of_responses_are_told_apart():
    def said(tau, level):
        settings = [f"{LOSS}.tau_pos={tau}", f"{LOSS}.tau_neg={tau}", f"{LOSS}.gate_level={level}"]
        found = [each.message for each in configuration_findings(_changed(*settings)) if each.check == "temperature"]
        assert len(found) in (0, 2)
        return found

    assert not said(12, "token")
    assert not said(100, "sequence")
    assert all("a token" in each for each in said(100, "token"))
    assert all("wide open" in each for each in said(10, "sequence"))
    assert all("a response" in each for each in said(9000, "sequence"))


def _doctor(capsys, *arguments):
    status = main([*arguments, "--config-only", "--json"])
    findings = json.loads(capsys.readouterr().out)
    assert status == int(any(finding["severity"] == "error" for finding in findings))
    return {(finding["severity"], finding["check"]) for finding in findings if finding["severity"] != "ok"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (PLAIN, set()),
        ([*PLAIN, *MIGRATION], set()),
        ([*PLAIN, *MIGRATION, f"{ACTOR}.use_kl_loss=true", f"{ACTOR}.kl_loss_coef=0.001"], set()),
        (["--config-path=./config", "--config-name=ppo_trainer", *PLAIN], set()),
        (["-cp", "config", "-cn", "ppo_megatron_trainer.yaml", *PLAIN], set()),
        ([*PLAIN, "critic.enable=true", "critic.model.path=/not/here"], set()),
        (MIGRATION, {("error", "rollout"), ("error", "micro_batch_size"), ("warning", "group_size")}),
        (["--config-name=fully_async_ppo_trainer", "rollout.nnodes=1"], {("warning", "entry_point")}),
        ([*PLAIN, "async_training.staleness_threshold=0.5"], {("warning", "entry_point")}),
        ([*PLAIN, "rollout.nnodes=1"], {("warning", "entry_point")}),
        (["no.such.key=1"], {("error", "compose")}),
        (["--config-name=nowhere"], {("error", "compose")}),
        (["--config-dir=nowhere"], set()),
    ],
    ids=lambda each: " ".join(each)[-60:] if isinstance(each, list) else None,
)
def test_command_lines(arguments, expected, capsys):
    assert _doctor(capsys, *arguments) == expected


def test_a_lines_own_loss_wins_over_the_recipe_and_the_doctor_says_so(capsys):
    line = ["--config-dir", str(RECIPES), "+algo=sspo", *PLAIN, f"{LOSS}.loss_mode=gspo", f"{ACTOR}.use_kl_loss=false"]
    assert ("error", "gate_unused") in _doctor(capsys, *line)


# A second or more each: CI runs every eighth, with SSPO as a user would add it. `-m slow` runs all, also without it.
@pytest.mark.parametrize(
    ("more", "every"),
    [
        pytest.param(MIGRATION, 8, id="some with sspo"),
        pytest.param(MIGRATION, 1, id="all with sspo", marks=pytest.mark.slow),
        pytest.param([], 1, id="all as they stand", marks=pytest.mark.slow),
    ],
)
def test_official_command_lines(more, every, capsys):
    if not LINES.is_file():
        pytest.skip("needs the command lines in ../shared/cases, which are not part of this repository")
    wrong = []
    for line in LINES.read_text().splitlines()[::every]:
        case = json.loads(line)
        found = _doctor(capsys, *case["args"], *more)
        errors = {check for severity, check in found if severity == "error"}
        uv = any(check == "py_executable" for _, check in found)
        if errors != set(case["errors"]) or uv != case["uv"]:
            wrong.append((case["id"], found))
    assert wrong == []


def test_the_command_line_in_words(capsys):
    recipe = ["--config-dir", str(RECIPES), "--config-name", "gsm8k", "--config-only"]
    assert main(recipe) == 0
    output = capsys.readouterr().out
    assert "0 errors, 0 warnings" in output
    assert "arctan of the log-ratio" in output
    assert main([*recipe, "no.such.key=1"]) == 1
    assert "no.such.key" in capsys.readouterr().out


@pytest.mark.parametrize(
    "named",
    [
        {
            "data.train_batch_size=many": "data.train_batch_size='many' must be a number",
            f"{ACTOR}.use_dynamic_bsz=perhaps": "use_dynamic_bsz='perhaps' must be true or false",
            "~trainer.nnodes": "trainer.nnodes is missing",
            "trainer.n_gpus_per_node=0": "trainer.n_gpus_per_node=0 must be a whole number of at least 1",
            # verl's default is null.
            "trainer.total_training_steps=many": "trainer.total_training_steps='many' must be a number",
            "data.gen_batch_size=0": "data.gen_batch_size=0 must be a whole number of at least 1",
            f"{ACTOR}.optim.lr=-1": f"{ACTOR}.optim.lr=-1 must not be negative",
            f"{ROLLOUT}.n=null": f"{ROLLOUT}.n=None must be a whole number",
        },
        {
            f"{LOSS}.loss_mode=[sspo]": "knows no policy loss",
            f"{ACTOR}.use_dynamic_bsz=false": "does not divide",
            f"{ACTOR}.ppo_micro_batch_size_per_gpu=0": "ppo_micro_batch_size_per_gpu=0 does not divide",
        },
        {"model_engine=paper": "paper"},
        {"data=1": "must be a string"},
    ],
)
def test_values_that_nothing_can_be_computed_from_are_named(named, capsys):
    recipe = ["--config-dir", str(RECIPES), "--config-name", "gsm8k", "--config-only"]
    assert main([*recipe, *named]) == 1
    output = capsys.readouterr().out
    for override, text in named.items():
        assert text in output, override


# --- the Python of the workers -------------------------------------------------------------------------------------


def _python(command):
    config = OmegaConf.create({"ray_kwargs": {"ray_init": {"runtime_env": {"py_executable": command}}}})
    from verl_sspo.doctor.interpreter import interpreter_findings

    return list(interpreter_findings(config))


def test_the_python_of_the_workers_is_asked(tmp_path):
    assert _python(None) == []
    assert [finding.severity for finding in _python(sys.executable)] == ["ok"]
    # A command of several words, like `conda run`. With -S the packages are not found.
    (without,) = _python(f"env {sys.executable} -S")
    assert without.severity == "error"
    (absent,) = _python(str(tmp_path / "python"))
    assert absent.severity == "warning"
    (failing,) = _python("false")
    assert failing.severity == "warning"


def test_an_environment_of_uv_is_read_from_its_lock(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [finding.severity for finding in _python("uv -v run --frozen --extra vllm")] == ["warning"]
    assert [finding.severity for finding in _python("/opt/bin/uv run --with verl-sspo")] == ["ok"]
    (tmp_path / "uv.lock").write_text('[[package]]\nname = "verl"\n')
    assert [finding.severity for finding in _python("uv run")] == ["error"]
    (tmp_path / "uv.lock").write_text('[[package]]\nname = "verl-sspo"\n')
    assert [finding.severity for finding in _python("uv run")] == ["ok"]


# --- nodes ---------------------------------------------------------------------------------------------------------


def test_registration_in_this_process_without_ray(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("started Ray"))
    assert [finding.severity for finding in environment.registration_findings()] == ["ok"]


def test_a_cluster_that_does_not_answer_loses_no_finding(monkeypatch):
    import ray

    def refuse(**_):
        raise TimeoutError("starting\nno answer after 30 s")

    monkeypatch.setattr(ray, "init", refuse)
    findings = list(environment.registration_findings("10.0.0.1:6379"))
    assert [finding.severity for finding in findings] == ["ok", "error"]
    assert "10.0.0.1:6379: no answer after 30 s" in findings[1].message


def test_a_cluster_that_asks_for_a_token(monkeypatch):
    import ray

    def refuse(**_):
        # As Ray 2.60 raises it.
        cause = RuntimeError("Failed to connect to GCS. [...] RPC error: InvalidAuthToken: Authentication token is ...")
        raise ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379") from cause

    monkeypatch.setattr(ray, "init", refuse)
    (finding,) = (each for each in environment.registration_findings("10.0.0.1:6379") if each.severity == "error")
    assert "asks for a token" in finding.message
    assert "RAY_AUTH_MODE=token" in finding.remedy


@pytest.mark.parametrize(
    ("changed", "check", "said"),
    [
        ({"registered": False}, "registered", "does not know `sspo`"),
        ({"versions": {"verl-sspo": "0.0.0"}}, "registered", "verl-sspo 0.0.0"),
        ({"versions": {"verl": "0.8.0"}}, "registered", "verl 0.8.0"),
        ({"missing": ["/data/train.parquet"]}, "paths", "node a: there is no /data/train.parquet"),
    ],
)
def test_a_node_that_is_not_like_this_one(changed, check, said):
    here = environment.node_report()
    assert [finding.severity for finding in environment.node_findings("node a", here, here["versions"])] == ["ok"]
    report = OmegaConf.to_container(OmegaConf.merge(here, changed))
    errors = [
        each for each in environment.node_findings("node a", report, here["versions"]) if each.severity == "error"
    ]
    assert [error.check for error in errors] == [check]
    assert said in errors[0].message


def test_a_node_reports_the_paths_that_it_does_not_have(tmp_path):
    absent = str(tmp_path / "absent")
    assert environment.node_report([str(tmp_path), absent])["missing"] == [absent]
    files = {"train_files": ["hdfs://a", "b.parquet"], "val_files": "/c.parquet"}
    config = _with(data=files, actor_rollout_ref={"model": {"path": str(tmp_path)}})
    assert environment.local_paths(config) == ["b.parquet", "/c.parquet", str(tmp_path)]
    config.actor_rollout_ref.model.path = "Qwen/Qwen3-8B"
    assert environment.local_paths(config) == ["b.parquet", "/c.parquet"]


def test_the_gpus_of_a_cluster():
    config = _changed("hardware=multinode")
    nodes, gpus = config.trainer.nnodes, config.trainer.n_gpus_per_node
    assert environment.gpu_finding([gpus] * nodes, config).severity == "ok"
    assert "asked for" in environment.gpu_finding([gpus] * (nodes - 1), config).message
    # Enough in total, but not on any single node.
    assert environment.gpu_finding([gpus / 2] * 2 * nodes, config).severity == "error"


def test_a_rollout_of_its_own_needs_gpus_besides_the_trainers(monkeypatch):
    overrides = ["hardware=fsdp_8gpu", "model=qwen2.5_7b_instruct", "+mode=separate_async", "+staleness=bypass"]
    key = f"{ROLLOUT}.checkpoint_engine"
    nccl = [f"{key}.backend=nccl", f"{key}.custom_backend_module=null", "ray_kwargs.ray_init.num_gpus=null"]
    config = compose_config("math", [*overrides, *nccl], RECIPES)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert "the rollout needs 1 besides" in next(environment.accelerator_findings(config)).message
    assert environment.gpu_finding([8], config).severity == "error"
    assert environment.gpu_finding([8, 1], config).severity == "ok"


def test_separate_async_that_verl_would_wait_for_or_refuse():
    overrides = ["+mode=separate_async", "+staleness=bypass"]

    def messages(*more):
        found = configuration_findings(compose_config("quickstart", [*overrides, *more], RECIPES))
        return [finding.message for finding in found if finding.severity == "error"]

    assert messages() == []
    (message,) = messages("trainer.n_gpus_per_node=2")
    assert "num_gpus=2, but trainer and rollout need 3" in message
    (message,) = messages("trainer.v1.separate_async.parameter_sync_step=3")
    assert "parameter_sync_step=3" in message


@pytest.mark.slow
def test_two_nodes_of_a_real_cluster(tmp_path):
    from ray.cluster_utils import Cluster

    model = tmp_path / "model"
    model.mkdir()
    config = _changed("hardware=cpu", f"{MODEL}.path={model}", f"data.train_files={tmp_path / 'absent.parquet'}")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1})
    try:
        cluster.add_node(num_cpus=1, num_gpus=0)
        findings = list(environment.registration_findings(cluster.address, config))
    finally:
        cluster.shutdown()
    assert [finding.severity for finding in findings if finding.check == "registered"] == ["ok"] * 3
    assert _said(findings, "paths").count("absent.parquet") == 2
    assert _said(findings, "cluster") == "1 GPUs on 2 nodes"


# --- packages, data, model, checkpoints, folders -------------------------------------------------------------------


def test_packages_that_a_recipe_needs(monkeypatch):
    config = compose_config("gsm8k", ["hardware=megatron_8gpu"], RECIPES)
    real = environment.installed
    missing = {"vllm", "megatron-core", "transformer-engine", "ray"}
    versions = {"torch": "0.0.1", **dict.fromkeys(missing)}
    monkeypatch.setattr(environment, "installed", lambda name: versions[name] if name in versions else real(name))
    findings = {finding.check: finding for finding in environment.package_findings(config)}
    assert {name for name in missing if findings[name].severity == "error"} == missing
    assert findings["torch"].severity == "warning"
    assert findings["verl"].severity == "ok"


def _with(**sections):
    defaults = {
        "data": {
            "max_prompt_length": 8,
            "max_response_length": 8,
            "train_batch_size": 2,
            "train_files": [],
            "val_files": [],
            "prompt_key": "prompt",
            "reward_fn_key": "data_source",
        },
        "reward": {"custom_reward_function": {"path": "pkg://verl_sspo.rewards"}},
    }
    return OmegaConf.merge(defaults, sections)


def _errors(findings):
    return [finding.check for finding in findings if finding.severity == "error"]


def _row(**changed):
    row = {"data_source": "d", "prompt": [], "ability": "math", "ground_truth": "1", "split": "train", "index": 0}
    return make_row(**{**row, **changed})


def test_data_that_verl_can_read(tmp_path):
    good = str(write_rows([_row(index=i) for i in range(3)], tmp_path / "good.parquet"))
    assert _errors(environment.data_findings(_with(data={"train_files": good, "val_files": [good]}))) == []
    few = _with(data={"train_files": good, "val_files": good, "train_batch_size": 4})
    assert _errors(environment.data_findings(few)) == ["data"]
    # Columns that verl does not read may be missing, and those that it reads may have other names.
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"question": ["?"] * 2, "data_source": ["d"] * 2, "reward_model": [{"a": 1}] * 2}), other)
    config = _with(data={"train_files": str(other), "val_files": str(other), "prompt_key": "question"})
    assert _errors(environment.data_findings(config)) == []


def test_data_that_verl_cannot_read(tmp_path):
    no_columns = tmp_path / "columns.parquet"
    pq.write_table(pa.table({"data_source": ["d"], "prompt": ["?"], "answer": ["!"]}), no_columns)
    no_parquet = tmp_path / "text.parquet"
    no_parquet.write_text("data_source,prompt")
    misspelt = [str(tmp_path / "colums.parquet"), str(tmp_path / "absent" / "x.parquet")]
    config = _with(data={"train_files": str(no_columns), "val_files": [str(no_parquet), *misspelt]})
    findings = list(environment.data_findings(config))
    assert _errors(findings) == ["data"] * 4
    assert "no column reward_model; it has data_source, prompt, answer" in findings[0].message
    assert "is not readable as parquet" in findings[1].message
    assert "did you mean columns.parquet?" in findings[2].message
    assert "nor a folder" in findings[3].message


@pytest.mark.parametrize("name", ['Jürgen\'s "data" {a},=$x', "[1]", "a[b", "runs?", "*", "a::b"])
def test_names_of_data_files_that_verls_reader_takes_for_patterns(tmp_path, name):
    folder = tmp_path / name
    for each in (folder, tmp_path / "runs1"):
        each.mkdir()
        rows = str(write_rows([_row()], each / "rows.parquet"))
    rows = str(folder / "rows.parquet")
    try:
        is_read = len(load_dataset("parquet", data_files=rows, cache_dir=str(tmp_path / "cache"))["train"]) == 1
    except (ValueError, FileNotFoundError):
        is_read = False
    config = _with(data={"train_files": rows, "val_files": rows, "train_batch_size": 1})
    assert _errors(environment.data_findings(config)) == ([] if is_read else ["data"] * 2)


def test_a_home_that_is_not_writable(tmp_path, monkeypatch):
    """verl's reader keeps a copy of the data there."""
    rows = str(write_rows([_row()], tmp_path / "rows.parquet"))
    config = _with(data={"train_files": rows, "val_files": rows, "train_batch_size": 1})
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache" / "datasets"))
    assert _errors(environment.data_findings(config)) == []
    monkeypatch.setattr(environment.os, "access", lambda *_: False)
    *_, finding = environment.data_findings(config)
    assert (finding.severity, finding.message.endswith(f"and {tmp_path} is not writable")) == ("error", True)


def test_data_that_is_not_looked_into():
    config = _with(data={"train_files": "hdfs://store/train.parquet", "val_files": ["rows.jsonl"]})
    assert [finding.severity for finding in environment.data_findings(config)] == ["warning"] * 2
    config = _with(data={"train_files": None, "val_files": "rows.json"})
    assert _errors(environment.data_findings(config)) == ["data"]


def test_code_needs_the_sandbox(tmp_path, monkeypatch):
    path = str(write_rows([_row(ability="code")] * 2, tmp_path / "code.parquet"))
    monkeypatch.setenv("PATH", str(tmp_path))
    config = _with(data={"train_files": path, "val_files": path})
    assert _errors(environment.data_findings(config)) == ["bubblewrap"]
    config.reward.custom_reward_function.path = None
    assert _errors(environment.data_findings(config)) == []


def test_model_folder(tmp_path):
    model = tmp_path / "model"
    model.mkdir()

    def findings(path, **more):
        actor = {"model": {"path": str(path), **more}, "rollout": {"name": "vllm"}}
        return list(environment.model_findings(_with(actor_rollout_ref=actor, trainer={"device": "cuda"})))

    assert "no config.json" in findings(model)[-1].message
    (misspelt,) = findings(tmp_path / "modle")
    assert "did you mean model?" in misspelt.message
    (model / "config.json").write_text(json.dumps({"max_position_embeddings": 16}))
    (finding,) = findings(model)
    assert (finding.severity, "no tokenizer" in finding.message) == ("error", True)
    assert _errors(findings(model, tokenizer_path="Qwen/Qwen3-8B")) == []
    (model / "tokenizer.json").touch()
    assert _errors(findings(model)) == []
    (model / "config.json").write_text(json.dumps({"max_position_embeddings": 15}))
    assert "15 positions" in findings(model)[-1].message


@pytest.mark.parametrize(
    ("hardware", "instructions", "width", "said"),
    [
        ("cpu", "avx512f avx512_bf16", 576, "set hardware=cpu_bf16"),
        ("cpu", "avx512f avx512_bf16", 64, None),
        ("cpu", "avx512f", 576, None),
        ("cpu_bf16", "amx_bf16", 576, None),
        ("cpu_bf16", "avx512f", 576, "set hardware=cpu"),
    ],
)
def test_number_format_of_a_cpu(hardware, instructions, width, said, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": width}))
    (tmp_path / "tokenizer.json").touch()
    (tmp_path / "cpuinfo").write_text(f"flags : fpu {instructions}\n")
    monkeypatch.setattr(instructions_of_the_cpu, "CPU_INFO", tmp_path / "cpuinfo")
    overrides = [f"hardware={hardware}", f"actor_rollout_ref.model.path={tmp_path}"]
    config = compose_config("word_problems", overrides, RECIPES)
    warnings = [each.remedy for each in environment.model_findings(config) if each.check == "bf16"]
    assert warnings == ([said] if said else [])


def test_a_users_missing_file_does_not_get_the_remedy_of_the_toy(tmp_path):
    config = compose_config(
        "quickstart", [f"data.val_files={tmp_path}/mine.parquet", f"task.folder={tmp_path}/toy"], RECIPES
    )
    train, val = environment.data_findings(config)
    assert "quickstart" in train.remedy
    assert "prepare-data" in val.remedy
    assert "quickstart" in next(environment.model_findings(config)).remedy


def test_checkpoints_of_an_unknown_algorithm(tmp_path):
    def findings(mode, loss_mode="sspo"):
        trainer = {"default_local_dir": str(tmp_path), "resume_mode": mode}
        actor = {"policy_loss": {"loss_mode": loss_mode}}
        return list(environment.checkpoint_findings(_with(trainer=trainer, actor_rollout_ref={"actor": actor})))

    assert findings("auto") == []
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    (finding,) = findings("auto")
    assert (finding.severity, "step 7" in finding.message) == ("warning", True)
    assert findings("auto", "vanilla")[0].severity == "ok"
    # The old checkpoints would be lost one by one, and until then lie beside the settings of another run.
    assert _errors(findings("disable")) == ["resume"]


def test_checkpoints_of_a_run_with_other_settings(tmp_path):
    def config(tau=10.0, steps=100, loss_mode="sspo"):
        overrides = [f"trainer.default_local_dir={tmp_path}", f"trainer.total_training_steps={steps}"]
        return _changed(*overrides, f"{LOSS}.tau_pos={tau}", f"{LOSS}.loss_mode={loss_mode}")

    settings.keep(config(), tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    # Training for longer is allowed.
    (finding,) = environment.checkpoint_findings(config(steps=200))
    assert finding.severity == "ok"
    (finding,) = environment.checkpoint_findings(config(loss_mode="gspo"))
    assert (finding.severity, "loss_mode: sspo there, gspo now" in finding.message) == ("error", True)
    (finding,) = environment.checkpoint_findings(config(tau=6.0))
    assert f"{LOSS}.tau_pos: 10.0 there, 6.0 now" in finding.message
    # verl was killed while it wrote its record: a restart repairs it and resumes.
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("")
    assert list(environment.checkpoint_findings(config(tau=6.0))) == []
    (tmp_path / "global_step_7").mkdir()
    (finding,) = environment.checkpoint_findings(config(tau=6.0))
    assert finding.severity == "error"


def test_folders(tmp_path, monkeypatch):
    config = _with(trainer={"default_local_dir": str(tmp_path / "run" / "checkpoints")})
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    monkeypatch.setattr(environment.os, "access", lambda path, _: str(path) == str(tmp_path))
    assert list(environment.folder_findings(config)) == []
    monkeypatch.setattr(environment.os, "access", lambda *_: False)
    (finding,) = environment.folder_findings(config)
    assert finding.message == f"{tmp_path} is not writable"
    monkeypatch.undo()
    # Ray itself fails with a folder of 43 characters.
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/" + "a" * 42)
    assert "too long for Ray" in next(environment.folder_findings(config)).message


# --- the settings in words -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        (Gate("arctan", "log"), 1.0),  # 1 / (1 + u^2) = 1/2
        (Gate("sigmoid", "log"), 2 * math.acosh(math.sqrt(2))),  # sech^2(u / 2) = 1/2
        (Gate("erf", "log"), math.sqrt(2 * math.log(2))),  # exp(-u^2 / 2) = 1/2
        (Gate("softsign", "log"), math.sqrt(2 ** (2 / 3) - 1)),  # (1 + u^2)^(-3/2) = 1/2
    ],
)
def test_half_width_in_the_log_domain(gate, expected):
    assert half_width(gate, 5.0) == pytest.approx(expected / 5.0, rel=1e-2)


def test_describe_says_what_is_in_effect_the_same_for_yaml_and_dataclass():
    config = compose_config("gsm8k", ["algo=sspo_forward"], RECIPES).actor_rollout_ref.actor
    text = describe(omega_conf_to_dataclass(config))
    assert text == describe(config)
    for part in (
        "arctan of the log-ratio, forward",
        "10 where A > 0",
        "12 elsewhere",
        "seq-mean-token-mean",
        "KL loss off",
    ):
        assert part in text


def test_temperatures_arrive_without_the_recipes():
    own = [f"{LOSS}._target_=verl_sspo.config.SSPOPolicyLossConfig", f"+{LOSS}.tau_pos=4"]
    config = compose_config("ppo_trainer", [*PLAIN, *MIGRATION, *own])
    assert _checks(configuration_findings(config)) == set()
    for actor in (config.actor_rollout_ref.actor, omega_conf_to_dataclass(config.actor_rollout_ref.actor)):
        assert "4 where A > 0: half of a token's gradient passes at log-ratio 0.25" in describe(actor)


# --- memory of one GPU -----------------------------------------------------------------------------------------------

# 2 layers of width 8, 2 heads (1 with keys and values), an MLP of 16, 32 words, tied embeddings.
TINY = {
    "model_type": "qwen2",
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
ON_ONE_GPU = [
    "hardware=gpu_hf",
    "model=tiny",
    "data.max_prompt_length=4",
    "data.max_response_length=6",
    "data.train_batch_size=8",
    f"{ACTOR}.ppo_mini_batch_size=2",
    f"{ROLLOUT}.n=2",
    f"{ROLLOUT}.max_num_seqs=10",
    f"{ACTOR}.ppo_max_token_len_per_gpu=20",
    f"{ROLLOUT}.log_prob_max_token_len_per_gpu=1000",
]


def test_memory_of_one_gpu():
    # Embedding 32 x 8; per layer q 8x8+8, k and v 8x4+4 each, o 8x8, MLP 3 x 8x16, two norms of 8; a last norm of 8.
    parameters = 32 * 8 + 2 * (72 + 2 * 36 + 64 + 384 + 16) + 8
    config = compose_config("gsm8k", ON_ONE_GPU, RECIPES)
    phases = memory.card_memory(config, AutoConfig.for_model(**TINY))
    assert phases == {
        # 20 tokens: a row has at most 4 + 2 x 6. Activations: the inputs of 2 layers in bfloat16, and one whole layer.
        "update": {
            "model, gradients and Adam": 16 * parameters,
            "activations": 20 * 2 * 8 * 2 + 20 * (24 * 8 + 11 * 16 + 3 * 16),
            "logits": 12 * 20 * 32,
        },
        # 16 responses of at most 10 tokens.
        "log-probs": {
            "model": 4 * parameters,
            "activations": 160 * (24 * 8 + 11 * 16 + 3 * 16),
            "logits": 18 * 160 * 32,
        },
        # 10 responses at a time. Keys and values: 1 head of width 4 in 2 layers, 10 tokens, bfloat16.
        "rollout": {"model": 2 * parameters, "keys and values": 2 * 2 * 2 * 1 * 4 * 10 * 10, "sampling": 22 * 10 * 32},
    }
    with_entropy = compose_config("gsm8k", [*ON_ONE_GPU, f"{ACTOR}.entropy_coeff=0.01"], RECIPES)
    assert memory.card_memory(with_entropy, AutoConfig.for_model(**TINY))["update"]["logits"] == 20 * 20 * 32


@pytest.mark.parametrize(("gibibytes", "severity"), [(None, "ok"), (2, "ok"), (1, "error")])
def test_a_gpu_that_is_too_small_is_an_error(monkeypatch, gibibytes, severity):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gibibytes is not None)
    properties = SimpleNamespace(total_memory=2**30 * (gibibytes or 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    (finding,) = memory.memory_findings(compose_config("gsm8k", ON_ONE_GPU, RECIPES), TINY)
    assert (finding.check, finding.severity) == ("memory", severity)
    assert (
        "estimated 1.0 GiB of GPU memory in the log-probs (model 0.0, activations 0.0, logits 0.0)" in finding.message
    )


def test_memory_is_estimated_for_the_rollout_hf_on_a_gpu_alone():
    for overrides in (["hardware=cpu", "model=tiny"], ["hardware=fsdp_1gpu"]):
        assert list(memory.memory_findings(compose_config("gsm8k", overrides, RECIPES), TINY)) == []
