"""The mathematics of SSPO without verl, and `registration`, which registers it with verl."""
