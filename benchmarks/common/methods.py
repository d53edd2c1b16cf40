"""Method objects for models with random weights: SeerAttention gets random gates, which cost what trained ones do."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.shapes import head_dim
from spin_hf.attention.methods.base import Method
from spin_hf.attention.methods.registry import METHODS
from spin_hf.attention.methods.seer import SeerAttention
from spin_hf.attention.methods.seer_gates import Gates, LayerGate, describe


def method_of(name: str, config: Any) -> Method:
    """The method of that name with its published parameters."""
    if name != "seer":
        return METHODS[name]()
    if id(config) not in _folders:
        _folders[id(config)] = _gates(config)
    return SeerAttention(_folders[id(config)])


_folders: dict[int, Path] = {}


def _gates(config: Any) -> Path:
    """A folder with random gates for a model, with gate keys as long as its keys."""
    folder, dim, heads = Path(tempfile.mkdtemp()), head_dim(config), config.num_key_value_heads
    group, generator = config.num_attention_heads // heads, torch.Generator().manual_seed(0)
    turns = float(config.rope_parameters["rope_theta"]) ** (-torch.arange(dim // 2) / (dim // 2))
    layers = {
        number: LayerGate(
            torch.randn((heads, 3 * dim, dim), generator=generator) * (3 * dim) ** -0.5,
            torch.randn((heads, group, dim, dim), generator=generator) * (group * dim) ** -0.5, turns, turns, False,
        )
        for number in range(config.num_hidden_layers)
    }  # fmt: skip
    Gates(layers, SeerAttention.page_size, describe(config)).save(folder / "gates.safetensors")
    return folder
