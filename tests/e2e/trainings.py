"""Trainings with verl's trainer in one Ray cluster, one after the other.

Starting a cluster and the driver takes longer than training for a few steps. `train_in_one_cluster` in conftest.py
starts this program:

    python trainings.py FOLDER

Each line of its input is JSON: name, configuration, Hydra overrides. For each line it writes the metrics of each step
to `FOLDER/<name>.jsonl` and prints `<name> ok` or `<name> failed`. All other output goes to stderr.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from verl.trainer.main_ppo import TaskRunnerV1, run_ppo

from verl_sspo.compose import RECIPES, compose_config


def train(config_name: str, overrides: list[str]) -> None:
    config = compose_config(config_name, overrides, RECIPES)
    try:
        run_ppo(config, TaskRunnerV1)
    finally:
        # verl would keep them until the process ends.
        for group in placement_group_table():
            remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group)))
    while ray.available_resources().get("GPU", 0) < config.trainer.n_gpus_per_node:
        time.sleep(0.1)


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ["VERL_FILE_LOGGER_ROOT"] = str(folder.parent)
    for line in sys.stdin:
        name, config_name, overrides = json.loads(line)
        # verl's file logger writes to <root>/<project_name>/<experiment_name>.jsonl.
        named = [f"trainer.project_name={folder.name}", f"trainer.experiment_name={name}"]
        started, answer = time.monotonic(), "ok"
        try:
            train(config_name, [*overrides, *named])
        except Exception:
            # The test that asked fails and shows this log. The trainings after it do not depend on it.
            traceback.print_exc()
            answer = "failed"
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
        print(name, answer, file=answers, flush=True)


if __name__ == "__main__":
    main()
