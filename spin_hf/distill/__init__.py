"""SeerAttention gates, trained on a model's own attention: `python -m spin_hf.distill`."""
