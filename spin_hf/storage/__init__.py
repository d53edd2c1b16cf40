"""Where keys and values live: sequences, pages, tiers and residency. Knows nothing of methods or of transformers."""
