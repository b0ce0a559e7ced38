"""Measures the project beside verl's own code: what `scripts/benchmark.py` runs. Nothing else imports it."""
