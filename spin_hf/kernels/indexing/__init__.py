"""Triton kernels that summarise, cluster and move pages, outside of decode steps."""
