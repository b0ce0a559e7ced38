"""Summarizes a run: verl's metrics as figures, a table and a picture."""
