"""Preflight: checks a configuration and the machines before a run starts.

`verl-sspo doctor` takes the command line of `verl.trainer.main_ppo`. `schema` compares keys and values with verl's own,
`rules` checks everything else in a configuration, `environment` checks machines, data and model.
"""

from verl_sspo.doctor.finding import Finding

__all__ = ["Finding"]
