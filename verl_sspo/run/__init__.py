"""Starts, watches, resumes and cleans up a verl `main_ppo`."""
