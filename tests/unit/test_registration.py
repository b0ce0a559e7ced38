"""verl finds the plugin by itself in a new process, and the user sees it if the plugin cannot be loaded."""

import os
import subprocess
import sys

FIND = """
import verl
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
print(get_policy_loss_fn("sspo").__module__, get_adv_estimator_fn("sspo").__module__)
"""


def python(code: str, tmp_path, **env: str) -> subprocess.CompletedProcess:
    """Runs `code` in a new interpreter, away from the checkout."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_importing_the_package_is_cheap_and_the_mathematics_needs_no_verl(tmp_path):
    code = """
import sys, verl_sspo
heavy = {"torch", "verl", "ray", "transformers"} & set(sys.modules)
assert not heavy, heavy
from verl_sspo.algorithm import advantage, gates, loss, metrics, reference
heavy = {"verl", "ray", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_plugin_that_fails_to_load_is_loud(tmp_path):
    """verl swallows the error, but the user must still see it."""
    code = """
import sys
sys.modules["verl_sspo.algorithm.registration"] = None  # its import now fails
import verl
"""
    done = python(code, tmp_path)
    assert done.returncode == 0  # verl continues
    assert "verl_sspo could not be loaded" in done.stderr
    assert "verl_sspo.algorithm.registration" in done.stderr
    assert "doctor" in done.stderr


def test_the_configuration_may_be_imported_before_verl(tmp_path):
    done = python("import verl_sspo.config\n" + FIND, tmp_path)
    assert done.stdout.split() == ["verl_sspo.algorithm.registration", "verl_sspo.algorithm.registration"], done.stderr
    assert "could not be loaded" not in done.stderr


def test_loading_twice_is_harmless(tmp_path):
    done = python("import verl_sspo.plugin, verl\n" + FIND, tmp_path, VERL_USE_EXTERNAL_MODULES="verl_sspo.plugin")
    assert done.stdout.split() == ["verl_sspo.algorithm.registration", "verl_sspo.algorithm.registration"], done.stderr
