"""Prepares what main_ppo needs: makes the task, and checks that the data exists."""

import re
from collections.abc import Collection
from pathlib import Path

from hydra.utils import get_method
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console

from verl_sspo.compose import flat


def data_files(config: DictConfig, key: str) -> list[str]:
    """The files named by `data.train_files` or `data.val_files`: one, several or none."""
    named = config.data[key]
    return [str(each) for each in named] if isinstance(named, ListConfig) else [str(named)] if named else []


def whole_paths(config: DictConfig) -> dict[str, str | list[str]]:
    """Settings that name existing files by relative paths, with absolute paths instead.

    Workers of an existing Ray cluster have a different working folder. Names on the Hugging Face hub and URLs are not
    files and stay as they are.
    """

    def whole(name: str) -> str:
        path = Path(name).expanduser()
        return str(path.resolve()) if name and path.exists() else name

    found = {}
    for key, value in flat(OmegaConf.to_container(config, resolve=True)):
        if isinstance(value, str | list) and re.search("(path|files?)$", key):
            absolute = whole(value) if isinstance(value, str) else [whole(each) for each in value]
            if absolute != value:
                found[key] = absolute
    return found


def prepare_task(config: DictConfig, console: Console | None = None, benchmarks: Collection[str] = ()) -> None:
    """Calls the configuration's `task.prepare` function, if any, and checks that all data files exist.

    Args:
        config: configuration of main_ppo; `task.prepare` names a function that takes the section `task` and a console.
        console: where the function shows its progress.
        benchmarks: further data files that must exist.

    Raises:
        FileNotFoundError: data files are missing; the message names them.
    """
    if prepare := OmegaConf.select(config, "task.prepare"):
        get_method(prepare)(config.task, console)
    files = [*benchmarks, *data_files(config, "train_files"), *data_files(config, "val_files")]
    if missing := sorted({file for file in files if "://" not in file and not Path(file).expanduser().exists()}):
        raise FileNotFoundError(
            f"no data at {', '.join(missing)}: run `verl-sspo prepare-data TASK`; the comment at the top of the recipe "
            "names the tasks"
        )
