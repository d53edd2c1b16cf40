"""What is patched in transformers, and what is taken from it."""
