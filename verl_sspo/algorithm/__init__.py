"""The mathematics of SSPO without verl, and `registration`, which hands it to verl."""
