"""Saved caches: a folder of safetensors files and one JSON, which holds what a cache holds."""
