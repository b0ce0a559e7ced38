"""The toy task, its tokenizer and model, and the command that trains it."""
