"""The devices of a model's layers: where their keys and values will be."""

from __future__ import annotations

import re
from typing import Any

import torch

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")


def layer_devices(model: Any, count: int) -> list[torch.device]:
    """Device of each of the first `count` decoder layers, which may differ. Without a model: the default device."""
    if model is None:
        return [torch.get_default_device()] * count
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    found: dict[int, torch.device] = {}
    first: torch.device | None = None
    for name, parameter in (model if decoder is None else decoder).named_parameters():
        if parameter.is_meta:
            continue
        match, first = _LAYER.search(name), first or parameter.device
        if match is not None:
            found.setdefault(int(match[1]), parameter.device)
    rest = first if first is not None else _offloaded_device(model)
    return [found.get(index, rest) for index in range(count)]


def _offloaded_device(model: Any) -> torch.device:
    """Device on which accelerate runs a model whose weights it loads on demand; else the default device."""
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return torch.get_default_device()
