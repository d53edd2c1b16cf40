"""Time per token, tokens per second, and where a decode step spends its time."""
