"""Composes configurations as verl's main_ppo does, and turns settings into Hydra overrides. Starts nothing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf

# The recipes as installed; in a clone they are the top-level folder `recipes`.
RECIPES = Path(__file__).parent / "recipes"

# Text that Hydra's override grammar reads as one unquoted string.
_PLAIN = re.compile(r"(?!(?:null|true|false|nan|inf)\Z)[A-Za-z_/][A-Za-z0-9_./@-]*", re.IGNORECASE)


def verl_config_dir() -> Path:
    """verl's own `verl/trainer/config`."""
    spec = find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("verl is not installed: run pip install -e . in a clone of this project")
    return Path(spec.submodule_search_locations[0]) / "trainer" / "config"


def compose_config(
    config_name: str = "ppo_trainer",
    overrides: Sequence[str] = (),
    config_dir: str | Path | None = None,
    config_path: str | Path = "config",
) -> DictConfig:
    """Composes what `main_ppo` would run with `--config-dir`, `--config-path`, `--config-name` and overrides.

    Args:
        config_name: a recipe, or one of verl's own configurations.
        overrides: Hydra overrides.
        config_dir: folder of the recipe; None for verl's own configurations alone.
        config_path: folder to use instead of verl's own; a relative path starts at the folder of `main_ppo`.

    Raises:
        hydra.errors.HydraException, omegaconf.errors.OmegaConfBaseException: a name or an override does not compose.
        ValueError: a group is set to a number.
        FileNotFoundError: there is no such folder or recipe.
    """
    base = (verl_config_dir().parent / config_path).resolve()
    own = Path(config_dir).resolve() if config_dir is not None else None
    if own is not None and not own.is_dir():
        raise FileNotFoundError(f"there is no recipe folder {own}")
    name = config_name.removesuffix(".yaml")
    if own is not None and not any((folder / f"{name}.yaml").is_file() for folder in (own, base)):
        # `base` holds what the recipes share; it cannot be trained by itself.
        there = sorted(path.stem for path in own.glob("*.yaml") if path.stem != "base")
        close = difflib.get_close_matches(name, there, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise FileNotFoundError(f"there is no recipe {name}: {meant}{own} has {', '.join(there)}")
    primary, other = base, own
    if own is not None and (own / f"{name}.yaml").is_file():
        primary, other = own, base
    search = [] if other is None else [f"hydra.searchpath={hydra_value([f'file://{other}'])}"]
    with initialize_config_dir(str(primary), version_base=None):
        return compose(name, overrides=[*search, *overrides])


@lru_cache
def reference_config(model_engine: str) -> dict[str, Any]:
    """verl's own ppo_trainer with this engine and no overrides: every key that verl knows. Do not modify the result."""
    config = compose_config("ppo_trainer", [f"model_engine={model_engine}"])
    return cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True))


def hydra_overrides(*settings: Mapping[str, Any]) -> list[str]:
    """Turns mappings into Hydra overrides: later ones win, and nested keys are joined by dots."""
    values = {key: value for each in settings for key, value in flat(each)}
    return [f"{key}={hydra_value(value)}" for key, value in values.items()]


def flat(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and values of a mapping, nested keys joined by dots."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def hydra_value(value: Any) -> str:
    """Formats a value in Hydra's grammar. Anything but null, bool, number, list or mapping is text, e.g. a path."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(hydra_value(each) for each in value)}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{hydra_value(each)}' for key, each in value.items())}}}"
    return str(value) if _PLAIN.fullmatch(str(value)) else quoted(str(value))


def quoted(text: str) -> str:
    """Puts a text in Hydra's quotes."""
    return QuotedString(text=text, quote=Quote.single).with_quotes()
