"""Triton kernels of a decode step, in the order of their launches."""
