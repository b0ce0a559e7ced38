"""Configuration: any value is either accepted as meant or rejected with an error that names its key."""

import atexit
import contextlib
import copy
import io
import math
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from properties import Property
from verl_sspo.algorithm.gates import DOMAINS, LEVELS, SHAPES, SIDES, Gate
from verl_sspo.compose import compose_config, hydra_overrides, hydra_value
from verl_sspo.config import SSPOAdvantageConfig, SSPOPolicyLossConfig
from verl_sspo.data.schema import make_row, write_rows
from verl_sspo.doctor import environment
from verl_sspo.doctor.command import main as doctor
from verl_sspo.doctor.configuration import configuration_findings
from verl_sspo.experiments.suite import expand, load_suite

RECIPES = Path(__file__).parents[3] / "recipes"

# Values that YAML may hold instead of what is meant.
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 64)
    | st.sampled_from((10**400, -(10**30), 0.0, math.nan, math.inf, -math.inf, "", "8", "null", "nan", "1e3"))
    | st.floats(-10, 10)
    | st.text(max_size=8)
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=5,
)


def policy_loss(settings: dict[str, Any]) -> None:
    """The gate's settings are valid, or the error names one of them."""
    try:
        gate = Gate.of_policy_loss(SSPOPolicyLossConfig(**settings))
    except ValueError as error:
        refused = str(error)
    else:
        assert gate.shape in SHAPES
        assert gate.domain in DOMAINS
        assert gate.side in SIDES
        assert gate.level in LEVELS
        assert 0 < gate.tau_pos < math.inf
        assert 0 < gate.tau_neg < math.inf
        return
    assert any(key in refused for key in settings), refused


def advantage(algorithm: Any) -> None:
    """The settings in `algorithm.sspo` are valid, or the error names this key."""
    try:
        options = SSPOAdvantageConfig.from_algorithm(algorithm)
    except ValueError as error:
        refused = str(error)
    else:
        assert not algorithm["sspo"] or set(algorithm["sspo"]) <= {"baseline", "std_floor", "stop_on_nonfinite"}
        assert options.baseline in ("mean", "leave_one_out")
        assert 0 <= options.std_floor < math.inf
        return
    assert "algorithm.sspo" in refused


@cache
def _recipe(name: str):
    """A recipe whose data and model exist, as far as the doctor reads them."""
    folder = Path(tempfile.mkdtemp(prefix="doctor-"))
    atexit.register(shutil.rmtree, folder)
    row = make_row(data_source="a", prompt=[], ability="math", ground_truth="1", split="train", index=0)
    write_rows([row] * 3, folder / "rows.parquet")
    (folder / "config.json").write_text('{"max_position_embeddings": 512}')
    (folder / "tokenizer.json").touch()
    rows = hydra_value(folder / "rows.parquet")
    overrides = [f"data.train_files={rows}", f"data.val_files={rows}", f"trainer.default_local_dir={folder}/run"]
    return compose_config(name, [*overrides, f"actor_rollout_ref.model.path={folder}"], RECIPES)


@cache
def _leaves(name: str) -> list[str]:
    """Dotted names of all values of a composed recipe."""

    def walk(node: Any, path: str):
        if isinstance(node, dict) and node:
            for key, child in node.items():
                yield from walk(child, f"{path}.{key}" if path else str(key))
        else:
            yield path

    return list(walk(OmegaConf.to_container(_recipe(name), resolve=False), ""))


# Keys that the doctor computes with, tried more often than the others.
COMPUTED = st.sampled_from(
    (
        *("data.train_batch_size", "data.max_prompt_length", "data.max_response_length", "data.seed", "data.shuffle"),
        *("trainer.nnodes", "trainer.n_gpus_per_node", "algorithm.sspo", "algorithm.rollout_correction"),
        *("data.train_files", "data.val_files", "data.prompt_key", "data.custom_cls", "data.custom_cls.path"),
        *("trainer.device", "trainer.default_local_dir", "trainer.resume_mode", "trainer.v1.trainer_mode"),
        *("actor_rollout_ref.model.path", "actor_rollout_ref.model.tokenizer_path", "task.folder"),
        *("reward.custom_reward_function", "reward.custom_reward_function.path"),
        "reward.custom_reward_function.reward_kwargs",
        *(
            f"actor_rollout_ref.actor.{key}"
            for key in (
                *("ppo_mini_batch_size", "ppo_micro_batch_size_per_gpu", "ppo_epochs", "ppo_max_token_len_per_gpu"),
                *("use_dynamic_bsz", "ulysses_sequence_parallel_size", "loss_agg_mode", "entropy_coeff", "use_kl_loss"),
                *("policy_loss.loss_mode", "policy_loss.tau_pos", "policy_loss.gate", "policy_loss._target_"),
                *("clip_ratio", "tau_pos", "kl_loss_coef", "strategy", "policy_loss"),
            )
        ),
        *(
            f"actor_rollout_ref.rollout.{key}"
            for key in (
                *("n", "temperature", "top_k", "tensor_model_parallel_size", "data_parallel_size", "name"),
                *("log_prob_micro_batch_size_per_gpu", "log_prob_max_token_len_per_gpu", "val_kwargs.n"),
            )
        ),
    )
)


@st.composite
def changed_recipes(draw) -> tuple[str, dict[str, Any]]:
    name = draw(st.sampled_from(("gsm8k", "quickstart")))
    keys = COMPUTED | st.deferred(lambda: st.sampled_from(_leaves(name)))
    return name, draw(st.dictionaries(keys, ANYTHING, min_size=1, max_size=3))


ENVIRONMENT = (
    *(environment.package_findings, environment.accelerator_findings, environment.data_findings),
    *(environment.model_findings, environment.checkpoint_findings, environment.folder_findings),
)


def doctor_on_values(recipe: tuple[str, dict[str, Any]]) -> None:
    """The doctor has findings about any configuration. It names bad values of settings that it computes with."""
    name, values = recipe
    config = copy.deepcopy(_recipe(name))
    for key, value in values.items():
        with contextlib.suppress(OmegaConfBaseException):  # two keys, one below the other
            OmegaConf.update(config, key, value, merge=False, force_add=True)
    findings = configuration_findings(config)
    if not any(finding.check in ("value", "interpolation") for finding in findings):
        with patch.object(environment, "_from_hub", side_effect=OSError("no network")):
            for ask in ENVIRONMENT:
                findings += ask(config)
    errors = "\n".join(f.message for f in findings if f.severity == "error")
    for key in ("data.train_batch_size", "trainer.n_gpus_per_node", "actor_rollout_ref.rollout.n"):
        value = values.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            assert key in errors, f"{key}={value!r} is not named in: {errors}"


OVERRIDES = st.lists(
    st.text(max_size=20)
    | st.builds("{}{}={}".format, st.sampled_from(("", "+", "++", "~")), COMPUTED, st.text(max_size=12))
    | st.sampled_from(
        ("algo=gspo", "algo=x", "hardware=cpu", "~data", "data=1", "actor_rollout_ref=null", "trainer={}", "hydra=3")
    ),
    max_size=4,
)


def doctor_on_command_lines(overrides: list[str]) -> None:
    """The doctor reports on anything that is typed, or argparse rejects it."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
            status = doctor(["--config-only", "--config-dir", str(RECIPES), "--config-name", "gsm8k", *overrides])
    except SystemExit:
        assert any(override.startswith("-") for override in overrides)
    else:
        assert status in (0, 1)
        assert output.getvalue()


@cache
def _suite(name: str) -> dict[str, Any]:
    return yaml.safe_load((RECIPES / "suites" / f"{name}.yaml").read_text())


def _places(node: Any, path: tuple = ()):
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from _places(child, (*path, key))


@st.composite
def suites(draw) -> str:
    """A suite file with a few values or keys changed, or any text."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.text(max_size=60))
    suite = copy.deepcopy(_suite(draw(st.sampled_from(("tiny", "table_sapo_gates")))))
    for _ in range(draw(st.integers(0, 2))):
        *path, last = draw(st.sampled_from(list(_places(suite))))
        node = suite
        for key in path:
            node = node[key]
        what = draw(st.integers(0, 2))
        if what == 0 or isinstance(node, list):
            node[last] = draw(ANYTHING)
        elif what == 1:
            del node[last]
        else:
            node[draw(st.text(max_size=6) | st.integers(0, 9))] = draw(ANYTHING)
    return yaml.safe_dump(suite)


def suite_file(text: str) -> None:
    """A suite that is accepted can be expanded, and Hydra reads the overrides of its cells."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "suite.yaml"
        path.write_text(text, encoding="utf-8", errors="replace", newline="")
        try:
            suite = load_suite(path)
        except ValueError as error:
            refused = str(error)
        else:
            for cell in expand(suite, "suite"):
                OverridesParser.create().parse_overrides(list(cell.overrides))
            return
    assert str(path) in refused


def _plain(value: Any) -> Any:
    """What Hydra keeps of a value: quoted strings are strings."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {_plain(key): _plain(each) for key, each in value.items()}
    return getattr(value, "text", value)


def overrides_keep_values(value: Any) -> None:
    """Hydra sets exactly the value that is in a suite."""
    [override] = OverridesParser.create().parse_overrides(hydra_overrides({"a": {"b": value}}))
    assert override.key_or_group == "a.b"
    read = _plain(override.value())
    assert type(read) is type(value)
    assert repr(read) == repr(value)  # NaN is not equal to itself


_VALUES = st.booleans() | st.none() | st.integers() | st.floats() | st.text()
PROPERTIES = {
    "config.policy_loss": Property(
        policy_loss,
        {
            "settings": st.fixed_dictionaries(
                {},
                optional={
                    "gate": st.sampled_from(SHAPES) | ANYTHING,
                    "gate_domain": st.sampled_from(DOMAINS) | ANYTHING,
                    "gate_side": st.sampled_from(SIDES) | ANYTHING,
                    "gate_level": st.sampled_from(LEVELS) | ANYTHING,
                    "tau_pos": st.floats(0.1, 12) | ANYTHING,
                    "tau_neg": st.floats(0.1, 12) | ANYTHING,
                    "stop_on_nonfinite": ANYTHING,
                },
            )
        },
    ),
    "config.advantage": Property(
        advantage,
        {
            "algorithm": st.fixed_dictionaries(
                {
                    "sspo": ANYTHING
                    | st.fixed_dictionaries(
                        {},
                        optional={
                            "baseline": st.sampled_from(("mean", "leave_one_out")) | ANYTHING,
                            "std_floor": ANYTHING,
                            "stop_on_nonfinite": ANYTHING,
                        },
                    )
                }
            )
        },
    ),
    "doctor.values": Property(doctor_on_values, {"recipe": changed_recipes()}, examples=4),
    "doctor.command_line": Property(doctor_on_command_lines, {"overrides": OVERRIDES}, examples=3),
    "suite.file": Property(suite_file, {"text": suites()}, examples=20),
    "suite.overrides": Property(overrides_keep_values, {"value": _VALUES | st.lists(_VALUES | st.lists(_VALUES))}),
}
