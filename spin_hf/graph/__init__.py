"""Whether a decode step is replayed as a CUDA graph: capture, replay, and what they take for granted."""
