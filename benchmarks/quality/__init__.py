"""KL divergence from dense attention, and questions about long texts."""
