import platform
from importlib.metadata import PackageNotFoundError, version

from hypothesis import settings

# Correctness is what the tests are about: a busy machine is no failure.
settings.register_profile("verl_sspo", deadline=None)
settings.load_profile("verl_sspo")


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def pytest_report_header() -> str:
    """What these results are about."""
    names = ("verl", "torch", "transformers", "ray", "vllm")
    return f"python {platform.python_version()}, " + ", ".join(f"{name} {_installed(name)}" for name in names)
