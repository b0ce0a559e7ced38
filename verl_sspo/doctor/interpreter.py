"""Checks that the Python of Ray's workers (`py_executable`) has this package."""

import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig

from verl_sspo.doctor.finding import Finding, error, ok, warning

KEY = "ray_kwargs.ray_init.runtime_env.py_executable"
#: Without the working folder on the path, as in a worker.
PROBE = "import sys; sys.path.remove(''); from importlib.metadata import version; print(version('verl-sspo'))"
#: Seconds that an environment has to answer; conda takes a few.
PATIENCE = 60


def interpreter_findings(config: DictConfig) -> Iterator[Finding]:
    """One finding if workers have their own Python: uv, conda, or a path."""
    ray_init = config.ray_kwargs.get("ray_init") or {}
    command = (ray_init.get("runtime_env") or {}).get("py_executable")
    if not command:
        return
    words = shlex.split(str(command))
    present, why = _uv(command) if words and Path(words[0]).stem in ("uv", "uvx") else _asked(words)
    if present:
        yield ok("py_executable", f"{command!r} has verl-sspo {why}")
        return
    kind, state = (error, "does not have") if present is False else (warning, "may not have")
    message = f"workers start with {command!r}, which {state} verl-sspo ({why})"
    yield kind("py_executable", message, f"install verl-sspo there, or set {KEY}=null")


def _uv(command: str) -> tuple[bool | None, str]:
    """Reads the lock file: running uv could install a whole environment."""
    if "verl-sspo" in command or "verl_sspo" in command:
        return True, "among its packages"
    here = Path.cwd()
    lock = next((path / "uv.lock" for path in (here, *here.parents) if (path / "uv.lock").is_file()), None)
    if lock is None:
        return None, "there is no uv.lock in this folder or its parents"
    return '"verl-sspo"' in lock.read_text(), f"in {lock}"


def _asked(words: list[str]) -> tuple[bool | None, str]:
    try:
        answer = subprocess.run([*words, "-c", PROBE], capture_output=True, text=True, timeout=PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as failure:
        return None, f"it did not answer: {failure}"
    if "PackageNotFoundError" in answer.stderr:
        return False, "it was run to check"
    found = answer.stdout.split()
    return (True, found[-1]) if found and answer.returncode == 0 else (None, f"it ended with {answer.returncode}")
