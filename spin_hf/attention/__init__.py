"""The methods, one file each, and the way into transformers' attention. Knows nothing of storage."""
