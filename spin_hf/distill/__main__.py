"""The command `python -m spin_hf.distill`."""

from .train import main

main()
