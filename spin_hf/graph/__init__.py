"""CUDA graphs of decode steps: capture, replay and the checks before and after a replay."""
