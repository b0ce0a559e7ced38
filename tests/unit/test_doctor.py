"""What the doctor says about an actor's configuration, about this machine, and on its command line."""

import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import verl  # noqa: F401  loads the plugin
from omegaconf import OmegaConf
from verl.utils.config import omega_conf_to_dataclass

from verl_sspo.algorithm.description import describe, half_width
from verl_sspo.algorithm.gates import Gate
from verl_sspo.data.schema import make_row, write_rows
from verl_sspo.doctor import actor_findings, environment
from verl_sspo.doctor.__main__ import main
from verl_sspo.doctor.configuration import configuration_findings
from verl_sspo.run import settings
from verl_sspo.run.compose import compose_config

RECIPES = Path(__file__).parents[2] / "recipes"


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
    assert "WARNING" not in text


def test_a_bare_verl_command_line_is_described_and_warned_of():
    override = "actor_rollout_ref.actor.policy_loss.loss_mode=sspo"
    config = compose_config("ppo_trainer", [override, "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1"])
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert {finding.check for finding in actor_findings(actor)} == {"aggregation", "target"}
    assert "arctan" in describe(actor)


def test_temperatures_arrive_without_the_recipes():
    loss = "actor_rollout_ref.actor.policy_loss"
    overrides = [
        f"{loss}.loss_mode=sspo",
        f"{loss}._target_=verl_sspo.config.SSPOPolicyLossConfig",
        f"+{loss}.tau_pos=4",
    ]
    sequence_mean = [
        "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean",
        "actor_rollout_ref.actor.use_dynamic_bsz=true",
    ]
    config = compose_config("ppo_trainer", [*overrides, *sequence_mean]).actor_rollout_ref.actor
    for actor in (config, omega_conf_to_dataclass(config)):
        assert actor_findings(actor) == []
        assert "4 where A > 0: half of a token's gradient passes at log-ratio 0.25" in describe(actor)


def _with(**sections):
    defaults = {
        "data": {
            "max_prompt_length": 8,
            "max_response_length": 8,
            "train_batch_size": 2,
            "train_files": [],
            "val_files": [],
        },
        "reward": {"custom_reward_function": {"path": "pkg://verl_sspo.rewards"}},
    }
    return OmegaConf.merge(defaults, sections)


def _errors(findings):
    return [finding.check for finding in findings if finding.severity == "error"]


def test_data_that_verl_can_read(tmp_path):
    rows = [
        make_row(
            data_source="d",
            prompt=[{"role": "user", "content": "?"}],
            ability="math",
            ground_truth="1",
            split="train",
            index=i,
        )
        for i in range(3)
    ]
    good = str(write_rows(rows, tmp_path / "good.parquet"))
    assert _errors(environment.data_findings(_with(data={"train_files": good, "val_files": [good]}))) == []
    few = _with(data={"train_files": good, "val_files": good, "train_batch_size": 4})
    assert _errors(environment.data_findings(few)) == ["data"]


def test_data_that_verl_cannot_read(tmp_path):
    no_columns = tmp_path / "columns.parquet"
    pq.write_table(pa.table({"data_source": ["d"], "prompt": ["?"]}), no_columns)
    no_parquet = tmp_path / "text.parquet"
    no_parquet.write_text("data_source,prompt")
    config = _with(
        data={"train_files": str(no_columns), "val_files": [str(no_parquet), str(tmp_path / "absent.parquet")]}
    )
    findings = list(environment.data_findings(config))
    assert _errors(findings) == ["data"] * 3
    assert "ability, reward_model, extra_info" in findings[0].message
    assert "no readable parquet" in findings[1].message
    assert "there is no" in findings[2].message


def test_data_that_is_not_looked_into():
    config = _with(data={"train_files": "hdfs://store/train.parquet", "val_files": ["rows.jsonl"]})
    findings = list(environment.data_findings(config))
    assert [finding.severity for finding in findings] == ["warning"] * 2
    config = _with(data={"train_files": None, "val_files": "rows.json"})
    assert _errors(environment.data_findings(config)) == ["data"]


def test_code_needs_the_sandbox(tmp_path, monkeypatch):
    row = make_row(data_source="mbpp", prompt=[], ability="code", ground_truth="{}", split="train", index=0)
    path = str(write_rows([row] * 2, tmp_path / "code.parquet"))
    monkeypatch.setenv("PATH", str(tmp_path))
    config = _with(data={"train_files": path, "val_files": path})
    assert _errors(environment.data_findings(config)) == ["bubblewrap"]
    config.reward.custom_reward_function.path = None
    assert _errors(environment.data_findings(config)) == []


def test_model_folder(tmp_path):
    def findings(path):
        return list(environment.model_findings(_with(actor_rollout_ref={"model": {"path": str(path)}})))

    assert _errors(findings(tmp_path)) == ["model"]
    assert _errors(findings(tmp_path / "absent")) == ["model"]
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 16}))
    assert _errors(findings(tmp_path)) == []
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 15}))
    assert "15 positions" in findings(tmp_path)[-1].message


def test_checkpoints(tmp_path):
    def findings(mode):
        return list(
            environment.checkpoint_findings(_with(trainer={"default_local_dir": str(tmp_path), "resume_mode": mode}))
        )

    assert findings("auto") == []
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    assert "step 7" in findings("auto")[0].message
    # They would be lost one by one, and until then stand beside the settings of another run.
    assert _errors(findings("disable")) == ["resume"]


def test_checkpoints_of_a_run_with_other_settings(tmp_path):
    def config(tau=10.0, steps=100):
        overrides = [f"trainer.default_local_dir={tmp_path}", f"trainer.total_training_steps={steps}"]
        return compose_config("gsm8k", [*overrides, f"actor_rollout_ref.actor.policy_loss.tau_pos={tau}"], RECIPES)

    settings.keep(config(), tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    # For longer, if that is wanted.
    (finding,) = environment.checkpoint_findings(config(steps=200))
    assert finding.severity == "ok"
    (finding,) = environment.checkpoint_findings(config(tau=6.0))
    assert finding.severity == "error"
    assert "actor_rollout_ref.actor.policy_loss.tau_pos: 10.0 there, 6.0 now" in finding.message
    # Killed while verl wrote its record: a restart mends it and goes on.
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("")
    assert list(environment.checkpoint_findings(config(tau=6.0))) == []
    (tmp_path / "global_step_7").mkdir()
    (finding,) = environment.checkpoint_findings(config(tau=6.0))
    assert finding.severity == "error"


def test_a_rollout_of_its_own_needs_gpus_besides_the_trainers(monkeypatch):
    overrides = ["hardware=fsdp_8gpu", "model=qwen2.5_7b_instruct", "+mode=separate_async", "+staleness=bypass"]
    key = "actor_rollout_ref.rollout.checkpoint_engine"
    nccl = [f"{key}.backend=nccl", f"{key}.custom_backend_module=null", "ray_kwargs.ray_init.num_gpus=null"]
    config = compose_config("math", [*overrides, *nccl], RECIPES)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert "the rollout wants 1 beside them" in next(environment.accelerator_findings(config)).message
    assert _errors(environment._cluster_gpus(1, 8, config)) == ["cluster"]
    assert _errors(environment._cluster_gpus(2, 9, config)) == []


def test_separate_async_that_verl_would_wait_for_or_refuse():
    overrides = ["+mode=separate_async", "+staleness=bypass"]

    def messages(*more):
        found = configuration_findings(compose_config("quickstart", [*overrides, *more], RECIPES))
        return [finding.message for finding in found if finding.severity == "error"]

    assert messages() == []
    (message,) = messages("trainer.n_gpus_per_node=2")
    assert "num_gpus=2, and trainer and rollout want 3" in message
    (message,) = messages("trainer.v1.separate_async.parameter_sync_step=3")
    assert "parameter_sync_step=3 times" in message


def test_packages_that_a_recipe_needs(monkeypatch):
    config = compose_config("gsm8k", ["hardware=megatron_8gpu"], RECIPES)
    real = environment._installed
    missing = {"vllm", "megatron-core", "transformer-engine", "ray"}
    monkeypatch.setattr(
        environment, "_installed", lambda name: None if name in missing else "0.0.1" if name == "torch" else real(name)
    )
    findings = {finding.check: finding for finding in environment.package_findings(config)}
    assert {name for name in missing if findings[name].severity == "error"} == missing
    assert findings["torch"].severity == "warning"
    assert findings["verl"].severity == "ok"


def test_registration_in_this_process_and_in_a_ray_worker():
    findings = list(environment.registration_findings())
    assert [finding.severity for finding in findings] == ["ok", "ok"]
    assert "Ray worker" in findings[1].message


def test_a_node_without_the_plugin_is_an_error():
    here = environment.registered_here()
    assert environment._registration(here, "node a").severity == "ok"
    assert environment._registration({**here, "loss": False}, "node a").severity == "error"
    other = {**here["versions"], "verl-sspo": "0.0.0"}
    assert environment._registration({**here, "versions": other}, "node a").severity == "error"


def test_command_line(capsys):
    recipe = ["--config-dir", str(RECIPES), "--config-name", "gsm8k", "--config-only"]
    assert main(recipe) == 0
    assert "arctan of the log-ratio" in capsys.readouterr().out
    assert main([*recipe, "--json", "algo=gspo", "custom_reward_function.path=x"]) == 1
    findings = json.loads(capsys.readouterr().out)
    assert [finding["check"] for finding in findings if finding["severity"] == "error"] == ["legacy"]
    assert main([*recipe, "no.such.key=1"]) == 1
    assert "no.such.key" in capsys.readouterr().out


@pytest.mark.parametrize(
    "named",
    [
        {
            "data.train_batch_size=many": "data.train_batch_size='many' must be a number",
            "actor_rollout_ref.actor.use_dynamic_bsz=perhaps": "use_dynamic_bsz='perhaps' must be true or false",
            "algorithm.rollout_correction=null": "algorithm.rollout_correction=None must be a section",
            "~trainer.nnodes": "trainer.nnodes is missing",
            "trainer.n_gpus_per_node=0": "trainer.n_gpus_per_node=0 must be a whole number of at least 1",
            "actor_rollout_ref.rollout.n=null": "actor_rollout_ref.rollout.n=None must be a whole number",
        },
        {
            "actor_rollout_ref.actor.policy_loss.loss_mode=[sspo]": "knows no policy loss",
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=0": "ppo_micro_batch_size_per_gpu=0 does not divide",
            "actor_rollout_ref.actor.use_dynamic_bsz=false": "does not divide",
        },
        {"actor_rollout_ref.actor.policy_loss.gate=clip": "gate='clip' is unknown"},
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
