"""Run as a script by another Python: prints its versions of verl and verl-sspo as JSON. Standard library only."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version


def installed(name: str) -> str | None:
    """The version of a distribution in this environment."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    print(json.dumps({name: installed(name) for name in ("verl", "verl-sspo")}))
