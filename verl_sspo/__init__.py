"""Soft Sequence Policy Optimization (SSPO, arXiv:2602.19327) for verl.

Importing this package is cheap: nothing of torch or verl is loaded. verl itself loads `verl_sspo.plugin`
through the entry-point group `verl.plugins`; the mathematics (`gates`, `loss`, `advantage`, `metrics`)
imports without verl.
"""

from importlib.metadata import version

__version__ = version("verl-sspo")
