"""Preflight: is this configuration, and this machine, what SSPO needs?

`python -m verl_sspo.doctor` takes the command line of `verl.trainer.main_ppo`. The checks of a configuration live in
`configuration`, those of machine, data and model in `environment`; both return `Finding`s. The loss calls
`describe` once when a worker starts.
"""

from verl_sspo.doctor.actor import actor_findings
from verl_sspo.doctor.finding import Finding

__all__ = ["Finding", "actor_findings"]
