"""Suites of runs, evaluation of checkpoints, and the report of a suite."""
