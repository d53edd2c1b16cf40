"""Page frames, page tables, and the longest context under a memory cap."""
