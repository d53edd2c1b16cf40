"""Short distillation runs: settings, text, and what a run reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spin_hf.distill.train import Settings

SETTINGS = Settings(steps=12, tokens=192, lr=5e-3, block=16, queries=48, recent_window=16)


def text(length: int = 3000, seed: int = 0) -> Tensor:
    """Tokens of a Markov chain, which repeat themselves as texts do."""
    generator = torch.Generator().manual_seed(seed)
    follows = torch.randint(3, 128, (128, 4), generator=torch.Generator().manual_seed(99))
    ids = [3]
    for choice in torch.randint(4, (length - 1,), generator=generator).tolist():
        ids.append(int(follows[ids[-1], choice]))
    return torch.tensor(ids)


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "distill.json").read_text())
