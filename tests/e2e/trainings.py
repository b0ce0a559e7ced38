"""Several trainings with verl's trainer in one Ray cluster, one after the other.

Started once for all settings of a test: starting a cluster takes longer than training for a few steps.

    python trainings.py FOLDER

FOLDER holds `settings.json`: Hydra overrides of `ppo_trainer` by the name of the training. It gets `<name>.jsonl`, the
metrics of each step.
"""

import json
import os
import sys
import time
from pathlib import Path

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from verl.trainer.main_ppo import TaskRunnerV1, run_ppo

from verl_sspo.compose import RECIPES, compose_config


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    os.environ["VERL_FILE_LOGGER_ROOT"] = str(folder.parent)
    for name, overrides in json.loads((folder / "settings.json").read_text()).items():
        started = time.monotonic()
        # verl's file logger writes to <root>/<project_name>/<experiment_name>.jsonl.
        named = [f"trainer.project_name={folder.name}", f"trainer.experiment_name={name}"]
        config = compose_config("ppo_trainer", [*overrides, *named], RECIPES)
        run_ppo(config, TaskRunnerV1)
        # verl leaves them to the end of the process.
        for group in placement_group_table():
            remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group)))
        while ray.available_resources().get("GPU", 0) < config.trainer.n_gpus_per_node:
            time.sleep(0.1)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
