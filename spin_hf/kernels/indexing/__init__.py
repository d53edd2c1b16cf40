"""Triton kernels that summarise pages, cluster tokens and copy rows, outside of captured decode steps."""
