"""Measures the project beside verl's own code: what `verl-sspo benchmark` runs. Nothing else imports it."""
