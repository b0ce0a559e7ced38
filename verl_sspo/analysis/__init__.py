"""What the losses do outside a trainer: trust regions, bias and variance."""
