"""Experiment suites: a YAML that names algorithms, seeds and overrides, run cell by cell as ordinary main_ppo runs."""
