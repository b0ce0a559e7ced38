"""Settings for all tests: Hypothesis without a deadline, the `long` mark, versions in pytest's header."""

import platform
from importlib.metadata import PackageNotFoundError, version

import pytest
from hypothesis import settings

# Tests check correctness, not speed: they must not fail on a busy machine.
settings.register_profile("verl_sspo", deadline=None)
settings.load_profile("verl_sspo")


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


# Files that `scripts/test.sh --fast` skips: they start verl, Ray or other programs, or compose many recipes.
LONG = {
    *("test_cli.py", "test_cpu_platform.py", "test_doctor.py", "test_fuzz.py", "test_launch.py", "test_recipes.py"),
    *(
        "test_kernel.py",
        "test_registration.py",
        "test_staleness_recipes.py",
        "test_suite.py",
        "test_theory.py",
        "test_train.py",
    ),
    "test_wheel.py",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name in LONG:
            item.add_marker("long")


def pytest_report_header() -> str:
    """The versions that are tested."""
    names = ("verl", "torch", "transformers", "ray", "vllm")
    return f"python {platform.python_version()}, " + ", ".join(f"{name} {_installed(name)}" for name in names)
