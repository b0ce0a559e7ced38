"""The settings of a run, kept beside its checkpoints, so that no run with other settings goes on from them unseen."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_sspo.run import atomic

KEPT = "settings.yaml"

# What is trained, and how. The rest of `trainer`, and `ray_kwargs`, say how long, how often and where.
SECTIONS = ("actor_rollout_ref.", "algorithm.", "critic.", "data.", "reward.", "trainer.v1.")


def keep(config: DictConfig, checkpoints: Path) -> None:
    """Writes the settings of a run that is about to start, in place of those of an earlier start."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    atomic.write(checkpoints / KEPT, resolved(config))


def changed(config: DictConfig, checkpoints: Path) -> list[str]:
    """In what this configuration trains otherwise than the run whose checkpoints these are, if that is known."""
    kept = checkpoints / KEPT
    if not kept.exists():
        return []
    return [each for each in differences(kept.read_text(), resolved(config)) if each.startswith(SECTIONS)]


def resolved(config: DictConfig) -> str:
    """A configuration as YAML, without interpolations."""
    return OmegaConf.to_yaml(config, resolve=True)


def differences(old: str, new: str) -> list[str]:
    """Keys in which two resolved configurations differ, with both values."""
    if old == new:
        return []

    def flat(node: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(node, dict):
            return {prefix.removesuffix("."): node}
        return {k: v for key, value in node.items() for k, v in flat(value, f"{prefix}{key}.").items()}

    old_values, new_values = (flat(OmegaConf.to_container(OmegaConf.create(text))) for text in (old, new))
    keys = [key for key in {**old_values, **new_values} if old_values.get(key) != new_values.get(key)]
    return [f"{key}: {old_values.get(key)} there, {new_values.get(key)} now" for key in keys]
