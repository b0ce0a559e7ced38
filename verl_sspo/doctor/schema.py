"""Compares keys and values of a configuration with verl's default configuration and its dataclasses."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator
from typing import Any

from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from verl_sspo.compose import flat, hydra_value, reference_config
from verl_sspo.config import SSPOPolicyLossConfig
from verl_sspo.doctor.finding import Finding, error

SSPO_TARGET = f"{SSPOPolicyLossConfig.__module__}.{SSPOPolicyLossConfig.__name__}"
#: Sections that verl passes on without a schema, or that this package reads.
OPEN_SECTIONS = (
    "algorithm.sspo",
    "reward.custom_reward_function.reward_kwargs",
    "reward.reward_kwargs",
    "ray_kwargs.ray_init",
)
#: Groups of our recipes. If the recipes are not on Hydra's search path, these compose as plain keys.
RECIPE_GROUPS = ("algo", "hardware", "model", "mode", "staleness")
#: Top-level sections of older versions of verl: 0.9 accepts them but does not read them.
LEGACY_SECTIONS = ("custom_reward_function", "reward_model", "sandbox_fusion")
#: Batches, lengths and groups of GPUs are computed from these, if verl's default is a positive number or null.
SIZES = re.compile(
    r"(data|trainer|actor_rollout_ref\.(actor|rollout))\.(?!.*turbo_config)(.*[._])?"
    r"(batch_size|prompt_length|response_length|parallel_size|max_token_len_per_gpu|ppo_epochs|nnodes|n_gpus_per_node|n"
    r"|total_epochs|total_training_steps)"
)
#: torch's optimizers reject negative values, but only after the model is loaded.
NOT_NEGATIVE = re.compile(r".*\.optim\.(lr|weight_decay)")
#: Must be strings: verl looks them up or opens them.
TEXTS = re.compile(
    r"trainer\.(default_local_dir|device)|data\.(prompt_key|reward_fn_key)|actor_rollout_ref\.model\.path"
)


def schema_findings(config: DictConfig) -> list[Finding]:
    """What verl would ignore or reject. If a finding has the check "value", the other checks cannot compute.

    Args:
        config: as `verl_sspo.compose.compose_config` returns it.
    """
    try:
        values: Any = OmegaConf.to_container(config, resolve=True)
    except Exception as wrong:  # verl would fail inside a Ray actor, where this is hard to read
        return [error("interpolation", str(wrong).splitlines()[0], "correct the reference that it names")]
    engine = values.get("model_engine")
    try:
        # For lists and the like Hydra says that there is no such engine.
        known = reference_config(hydra_value(str(engine)))
    except HydraException:
        remedy = "set model_engine=dp or model_engine=megatron"
        return [error("value", f"model_engine={engine!r} is not an engine of verl", remedy)]
    found = list(_compare(values, known, ""))
    if useless := [finding for _, finding in found if finding.check == "value"]:
        return useless
    # A recipe's own section is read by the keys that refer to it. A custom data set class may read any key of `data`.
    referred = re.findall(r"\$\{([\w.]+)\}", str(OmegaConf.to_container(config, resolve=False)))
    custom = bool(config.data.custom_cls.path)
    unknown = [
        finding
        for path, finding in found
        if not any(f"{each}.".startswith(f"{path}.") for each in referred) and not (custom and path.startswith("data."))
    ]
    return [*_legacy(values), *_classes(values), *unknown]


def _compare(values: dict, known: dict, prefix: str, cls: Any = None) -> Iterator[tuple[str, Finding]]:
    """Missing keys, values of another type than verl's default, and keys that verl does not know, each with its path.

    `cls` is verl's dataclass for the section, unless `_target_` names another.
    """
    if "_target_" in values:
        try:
            cls = get_class(str(values["_target_"]))
        except (ImportError, ValueError):
            return  # its keys are not known; `_classes` reports this
    types = typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
    for key in [*known, *(key for key in values if key not in known)]:
        path, kind = f"{prefix}{key}", types.get(key)
        kinds = typing.get_args(kind) or (kind,)
        if path in OPEN_SECTIONS or dict in (kind, typing.get_origin(kind)):
            if not isinstance(values.get(key), dict | None):
                yield path, _wrong(path, values[key], "must be a section")
            continue
        if key not in values:
            yield path, error("value", f"{path} is missing, and verl reads it", "do not remove it")
        elif key not in known:
            if key not in types:
                yield path, _unknown(path, str(key), [*known, *types])
        elif isinstance(known[key], dict) and known[key]:
            if isinstance(values[key], dict):
                section = next((each for each in kinds if dataclasses.is_dataclass(each)), None)
                yield from _compare(values[key], known[key], f"{path}.", section)
            elif values[key] is not None or type(None) not in kinds:
                yield path, _wrong(path, values[key], "must be a section")
        elif not (str in kinds and isinstance(values[key], str)) and (must := _must_be(path, values[key], known[key])):
            yield path, _wrong(path, values[key], must)


def _must_be(path: str, value: Any, default: Any) -> str:
    """What is wrong with a value, judged by verl's default; empty if nothing is."""
    if isinstance(default, bool):
        return "" if isinstance(value, bool | None) else "must be true or false"
    if TEXTS.fullmatch(path):
        return "" if isinstance(value, str) else "must be a string"
    if default is None and value is not None and SIZES.fullmatch(path):
        default = 1
    if not isinstance(default, int | float):
        return ""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        return "must be a number"
    if isinstance(default, int) and default > 0 and SIZES.fullmatch(path):
        return "" if isinstance(value, int) and value >= 1 else "must be a whole number of at least 1"
    if NOT_NEGATIVE.fullmatch(path) and (value or 0) < 0:
        return "must not be negative"
    return ""


def _wrong(path: str, value: Any, must: str) -> Finding:
    return error("value", f"{path}={value!r} {must}", f"correct {path}")


def _unknown(path: str, key: str, known: list[str]) -> Finding:
    section, _, _ = path.rpartition(".")
    if section == "actor_rollout_ref.actor.policy_loss" and key in SSPOPolicyLossConfig.__dataclass_fields__:
        remedy = f"set {section}._target_={SSPO_TARGET}, which has it"
    elif path in RECIPE_GROUPS:
        remedy = f"add --config-dir with the recipes of verl-sspo: without it {path} selects nothing"
    else:
        close = difflib.get_close_matches(key, known, n=1)
        remedy = f"did you mean {close[0]}? " if close else ""
        remedy += f"correct it, or remove {path}"
    return error("unknown_key", f"verl does not know {path}: it is ignored, or stops a worker", remedy)


def _legacy(values: dict) -> Iterator[Finding]:
    for path, value in flat({section: values.get(section) for section in LEGACY_SECTIONS}):
        if value is not None:
            new = path.replace("reward_model.reward_manager", "reward_manager.name")
            yield error("legacy", f"verl 0.9 does not read {path}", f"set reward.{new} instead")


def _classes(values: dict) -> Iterator[Finding]:
    """Checks that every `_target_` exists: verl imports most of them only in its workers, on the GPUs."""
    for path, target in flat(values):
        if path.split(".")[-1] == "_target_":
            try:
                get_class(str(target))
            except (ImportError, ValueError) as wrong:
                message = f"{path}={target} is not a class: {str(wrong).splitlines()[0]}"
                yield error("class", message, "correct the name, or install its package")
