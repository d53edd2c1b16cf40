"""Decode steps over many caches of one sequence each."""
