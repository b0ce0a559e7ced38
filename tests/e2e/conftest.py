"""Fixtures of the end-to-end tests: a small task, and a Ray cluster that several tests share."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from verl_sspo.quickstart.model import prepare_arithmetic

THREADS = "++ray_kwargs.ray_init.runtime_env.env_vars.VERL_SSPO_THREADS='1'"


@pytest.fixture(scope="session")
def task(tmp_path_factory) -> Path:
    """One-digit additions, and a model trained just long enough that some of its answers are right."""
    root = tmp_path_factory.mktemp("arithmetic")
    return prepare_arithmetic(root, digits=1, train_size=32, val_size=16, warm_up_steps=60)


@pytest.fixture(scope="session")
def train_in_one_cluster(tmp_path_factory):
    """A function that trains. All its trainings run in one Ray cluster, see `trainings`.

    It takes the name of a configuration and Hydra overrides, and returns the metrics of each step, by step.
    """
    folder = tmp_path_factory.mktemp("trainings")
    log, numbers = folder / "log", itertools.count()
    with (
        log.open("w") as output,
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("trainings.py")), str(folder)],
            env=os.environ | {"VERL_PLATFORM": "cpu", "RAY_ADDRESS": "local"},
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
        ) as process,
    ):

        def train(config_name: str, *overrides: str) -> dict[int, dict[str, float]]:
            name = f"training{next(numbers)}"
            always = [THREADS, "trainer.logger=[console,file]", f"trainer.default_local_dir={folder / name}"]
            print(json.dumps([name, config_name, [*always, *overrides]]), file=process.stdin, flush=True)
            assert process.stdout.readline() == f"{name} ok\n", log.read_text()[-8000:]
            lines = map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())
            return {line["step"]: line["data"] for line in lines}

        yield train
        process.stdin.close()
