"""Runs code in a process that has imported verl and done nothing else.

Each process is forked from a server that has imported verl, because the import takes 9 seconds of CPU time.
"""

import multiprocessing
import os
import sys
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["verl"])


def _execute(code: str, environment: dict[str, str], output: Path) -> None:
    with output.open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    for name in [name for name in os.environ if name.startswith("VERL_")]:
        del os.environ[name]
    os.environ.update(environment)
    exec(compile(code, "<test>", "exec"), {"__name__": "__test__"})


def run(code: str, folder: Path, **environment: str) -> None:
    """Runs `code` with these VERL_ variables and no others. The test fails if it raises."""
    output = folder / "stderr"
    process = SERVER.Process(target=_execute, args=(code, environment, output))
    process.start()
    process.join(timeout=300)
    process.kill()  # if it hangs
    process.join()
    assert process.exitcode == 0, output.read_text()[-4000:]
