"""Soft Sequence Policy Optimization (SSPO, arXiv:2602.19327) for verl.

verl loads `verl_sspo.plugin` (entry-point group `verl.plugins`). Importing this package loads neither torch nor verl.
"""


def __getattr__(name: str) -> str:
    """`verl_sspo.__version__`, looked up on demand because that takes a tenth of a second."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version

    return version("verl-sspo")
