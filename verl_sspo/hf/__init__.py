"""verl on plain transformers, on any device: the rollout `hf`, an engine and an agent loop for short responses."""
