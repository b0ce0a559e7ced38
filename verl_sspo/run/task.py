"""What a configuration needs before main_ppo starts: its task is made, its data is there."""

from collections.abc import Collection
from pathlib import Path

from hydra.utils import get_method
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console


def data_files(config: DictConfig, key: str) -> list[str]:
    """What `data.train_files` or `data.val_files` names: a file, several, or nothing."""
    named = config.data[key]
    return [str(each) for each in named] if isinstance(named, ListConfig) else [str(named)] if named else []


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
