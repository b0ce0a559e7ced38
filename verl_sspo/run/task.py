"""What a configuration needs before main_ppo starts: its task is made, its data is there."""

import re
from collections.abc import Collection
from pathlib import Path

from hydra.utils import get_method
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console

from verl_sspo.compose import flat


def data_files(config: DictConfig, key: str) -> list[str]:
    """What `data.train_files` or `data.val_files` names: a file, several, or nothing."""
    named = config.data[key]
    return [str(each) for each in named] if isinstance(named, ListConfig) else [str(named)] if named else []


def whole_paths(config: DictConfig) -> dict[str, str | list[str]]:
    """Settings that name files of this machine by relative paths, with absolute ones.

    Workers of a Ray cluster that is joined have another working folder. Names of the Hugging Face hub and addresses
    are no files, and not among them.
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
    """Calls the function `task.prepare` of the configuration, if there is one, and checks that all data files exist.

    Args:
        config: of main_ppo; `task.prepare` names a function of the section `task` and a console.
        console: where the function shows its progress.
        benchmarks: further data files that must exist.

    Raises:
        FileNotFoundError: data files are missing; the message says which.
    """
    if prepare := OmegaConf.select(config, "task.prepare"):
        get_method(prepare)(config.task, console)
    files = [*benchmarks, *data_files(config, "train_files"), *data_files(config, "val_files")]
    if missing := sorted({file for file in files if "://" not in file and not Path(file).expanduser().exists()}):
        raise FileNotFoundError(
            f"no data at {', '.join(missing)}: `verl-sspo prepare-data TASK` makes it; the head of the recipe names "
            "the tasks"
        )
