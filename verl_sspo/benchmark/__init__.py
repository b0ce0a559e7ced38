"""Compares the project with verl's own code and transformers (`verl-sspo benchmark`). Nothing else imports it."""
