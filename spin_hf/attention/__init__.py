"""The attention function that transformers calls, and the methods that select pages. Independent of storage."""
