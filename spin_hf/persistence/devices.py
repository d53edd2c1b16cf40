"""The devices of a model's layers: where their keys and values will be."""

from __future__ import annotations

import re
from typing import Any

import torch

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")


def layer_devices(model: Any, count: int) -> list[torch.device]:
    """Devices of the first `count` decoder layers, of which a model may spread its own; the default device without a model."""
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
    hooks = (
        getattr(module, "_hf_hook", None) for module in model.modules()
    )  # of weights that accelerate loads on demand
    used = (getattr(hook, "execution_device", None) for hook in hooks)
    given = next((device for device in used if device is not None), None)
    rest = first if first is not None else torch.get_default_device() if given is None else torch.device(given)
    return [found.get(index, rest) for index in range(count)]
