"""What a run was like: verl's metrics as figures, a table and a picture."""
