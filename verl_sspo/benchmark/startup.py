"""The time that the plugin adds to the import of verl in every process of a training."""

import os
import subprocess
import sys

import pandas as pd

from verl_sspo.benchmark.measure import Section

# The plugin registers with core_algos, which every process of a training imports.
CODE = """
import time
start = time.perf_counter()
import verl.trainer.ppo.core_algos
middle = time.perf_counter()
import verl_sspo.plugin
print(middle - start, time.perf_counter() - middle)
"""


def measure(processes: int) -> list[Section]:
    """Seconds that new processes take to import verl, and then the plugin."""
    command, environment = [sys.executable, "-c", CODE], os.environ | {"VERL_USE_EXTERNAL_PLUGINS": "none"}
    lines = [subprocess.check_output(command, env=environment, text=True).splitlines()[-1] for _ in range(processes)]
    seconds = pd.DataFrame([line.split() for line in lines], columns=["verl", "plugin"]).astype(float)
    table = pd.DataFrame({"seconds": seconds.median(), "least": seconds.min(), "most": seconds.max()})
    table["/ verl"] = table["seconds"] / table.loc["verl", "seconds"]
    return [Section("Import of the plugin", f"Median over {processes} new processes.", table)]
