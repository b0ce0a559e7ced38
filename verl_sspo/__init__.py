"""Soft Sequence Policy Optimization (SSPO, arXiv:2602.19327) for verl.

verl loads `verl_sspo.plugin` (entry-point group `verl.plugins`). Importing this package loads neither torch nor verl.
"""

from importlib.metadata import version

__version__ = version("verl-sspo")
