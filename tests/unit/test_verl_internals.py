"""What this package uses from verl, read from the package's source. If verl changes, a test names what changed.

New code needs no change here: imports, calls and base classes are found, not listed. The exceptions are `CALLED` and
`FIELDS`.
"""

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
import verl  # noqa: F401  loads the plugin

import verl_sspo
import verl_sspo.cpu
import verl_sspo.hf
from verl_sspo.rewards import compute_score

PACKAGE = Path(verl_sspo.__file__).parent
SOURCES = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(dotted name, name in the file) of everything that is imported from verl."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((each.name, each.asname or each.name) for each in node.names if each.name.startswith("verl."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "verl":
            yield from ((f"{node.module}.{each.name}", each.asname or each.name) for each in node.names)


def resolved(name: str) -> Any:
    """The module or object with this name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return resolve_name(name)


def fits(function: Any, call: ast.Call) -> bool:
    """Whether a call fits a signature. A call with * or ** always counts as fitting."""
    if any(isinstance(each, ast.Starred) for each in call.args) or any(each.arg is None for each in call.keywords):
        return True
    try:
        inspect.signature(function).bind(*call.args, **{str(each.arg): each.value for each in call.keywords})
    except TypeError:
        return False
    return True


NAMES = sorted({name for tree in SOURCES.values() for name, _ in imported(tree)})


def test_something_is_read():
    assert len(NAMES) > 20
    assert "verl.trainer.ppo.core_algos.register_policy_loss" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_we_import_from_verl_is_there(name):
    assert resolved(name) is not None


@pytest.mark.parametrize("file", [file for file, tree in SOURCES.items() if any(imported(tree))])
def test_what_we_call_takes_our_arguments(file):
    names = {alias: name for name, alias in imported(SOURCES[file])}
    for node in ast.walk(SOURCES[file]):
        if not isinstance(node, ast.Call):
            continue
        root, _, attribute = ast.unparse(node.func).partition(".")
        if root in names and "(" not in attribute:
            name = ".".join(filter(None, (names[root], attribute)))
            if inspect.isbuiltin(resolved(name)):  # a method of a registry, which is a dict
                continue
            assert fits(resolved(name), node), f"{file}:{node.lineno}: {name} does not take {ast.unparse(node)}"


def subclasses() -> Iterator[type]:
    """Classes of the CPU platform and of `hf` that derive from verl's."""
    modules = [
        module
        for package in (verl_sspo.cpu, verl_sspo.hf)
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
        if not module.name.endswith("vllm_cpu")  # imports vLLM
    ]
    for module in modules:
        for value in vars(importlib.import_module(module.name)).values():
            bases = inspect.getmro(value)[1:] if inspect.isclass(value) and value.__module__ == module.name else ()
            if any(base.__module__.split(".")[0] == "verl" for base in bases):
                yield value


def test_our_classes_implement_what_verl_leaves_to_subclasses():
    found = list(subclasses())
    assert len(found) >= 3
    for each in found:
        assert not inspect.isabstract(each), f"{each.__name__} lacks {sorted(each.__abstractmethods__)}"


def test_our_methods_take_the_arguments_of_those_they_override():
    for each in subclasses():
        for name, method in vars(each).items():
            overridden = next((vars(base)[name] for base in each.__mro__[1:] if name in vars(base)), None)
            if name.startswith("__") or not inspect.isfunction(method) or not inspect.isfunction(overridden):
                continue
            ours, theirs = inspect.signature(method).parameters, inspect.signature(overridden).parameters
            if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in ours.values()):
                continue
            # Without *args, **kwargs, and what Ray's tracing adds to the methods of an actor.
            named = {
                key for key, parameter in theirs.items() if parameter.kind not in (2, 4) and not key.startswith("_ray_")
            }
            assert named <= set(ours), f"{each.__name__}.{name} does not take {sorted(named - set(ours))}"


# Where verl calls what we register: verl's module, the name of the function there, our function.
CALLED = [
    ("verl.workers.utils.losses", "policy_loss_fn", "verl_sspo.algorithm.registration.compute_policy_loss_sspo"),
    ("verl.experimental.reward_loop.reward_manager.naive", "compute_score", "verl_sspo.rewards.compute_score"),
]


@pytest.mark.parametrize(("module", "function", "ours"), CALLED)
def test_verl_calls_ours_with_arguments_that_it_takes(module, function, ours):
    source = Path(find_spec(module).origin).read_text()
    calls = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and f".{ast.unparse(node.func)}".endswith(f".{function}")
    ]
    assert calls
    for call in calls:
        assert fits(resolve_name(ours), call), ast.unparse(call)


# Fields of verl's configurations that we read or set.
FIELDS = {
    "PolicyLossConfig": "loss_mode",
    "ActorConfig": "policy_loss global_batch_info loss_agg_mode loss_scale_factor ppo_epochs ppo_mini_batch_size",
    "RolloutConfig": "tensor_model_parallel_size data_parallel_size pipeline_model_parallel_size max_model_len "
    "max_num_seqs dtype load_format prompt_length response_length temperature top_k top_p seed repetition_penalty "
    "ignore_eos checkpoint_engine",
    "HFModelConfig": "hf_config generation_config tokenizer local_path trust_remote_code",
}


@pytest.mark.parametrize("name", FIELDS)
def test_configurations_have_the_fields(name):
    cls = resolve_name(f"verl.workers.config.{name}")
    assert is_dataclass(cls)
    assert set(FIELDS[name].split()) <= {each.name for each in fields(cls)}


def test_verl_reduces_metrics_by_their_names():
    from verl.utils.metric import reduce_metrics

    assert reduce_metrics({"a": [1, 3], "a_max": [1, 3], "a_min": [1, 3]}) == {"a": 2, "a_max": 3, "a_min": 1}


def test_verl_finds_the_reward_function_of_the_recipes():
    from verl.utils.import_utils import load_extern_object

    assert load_extern_object("pkg://verl_sspo.rewards", "compute_score") is compute_score


def test_verl_finds_its_last_checkpoint_by_the_names_that_we_check(tmp_path):
    from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path

    (tmp_path / "global_step_7").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    assert find_latest_ckpt_path(str(tmp_path)) == str(tmp_path / "global_step_7")


def test_verl_writes_metrics_as_json_lines_where_we_read_them(tmp_path, monkeypatch):
    import json

    from verl.utils.tracking import FileLogger

    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(tmp_path / "metrics.jsonl"))
    logger = FileLogger("project", "experiment")
    logger.log(data={"actor/loss": 0.5}, step=3)
    logger.fp.flush()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 3, "data": {"actor/loss": 0.5}}


def test_verls_loss_aggregation_takes_what_verl_puts_into_global_batch_info():
    from verl.trainer.ppo.core_algos import agg_loss

    info = {"dp_size": 2, "batch_num_tokens": 8, "global_batch_size": 4, "loss_scale_factor": None}
    loss = agg_loss(torch.ones(2, 2), torch.ones(2, 2), "seq-mean-token-mean", **info)
    assert loss == pytest.approx(1.0)  # 2 of 4 responses, times two ranks
