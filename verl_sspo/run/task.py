"""What a configuration needs before main_ppo starts: its task is made, its data is there."""

from collections.abc import Collection
from pathlib import Path

from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf
from rich.console import Console


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
    files = list(benchmarks)
    for named in (config.data.train_files, config.data.val_files):
        files += [named] if isinstance(named, str) else list(named)
    if missing := sorted({file for file in files if "://" not in file and not Path(file).expanduser().exists()}):
        raise FileNotFoundError(
            f"no data at {', '.join(missing)}: `verl-sspo prepare-data TASK` makes it; the head of the recipe names "
            "the tasks"
        )
