"""Registers the rollout `hf` where the platform is not `cpu`, which registers it itself.

verl imports this module in each of its processes where `VERL_USE_EXTERNAL_MODULES` names it;
recipes/hardware/gpu_hf.yaml does.
"""

from verl_sspo.cpu.internals import register_rollout

register_rollout()
