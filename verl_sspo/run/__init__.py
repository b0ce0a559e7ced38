"""Starts, monitors, resumes and cleans up runs of verl's `main_ppo`."""
