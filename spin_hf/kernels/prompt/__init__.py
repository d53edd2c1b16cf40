"""Triton kernels of prompts, outside of captured decode steps."""
