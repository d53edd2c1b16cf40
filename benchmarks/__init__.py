"""Benchmarks by purpose: `python -m benchmarks.speed.decode`; results are in `benchmarks/results`."""
