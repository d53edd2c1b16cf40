"""On which devices the paged layers of a cache are, before and after they have pages.

all layers have pages     where these are
before that               where the model's layers are (`integration/device_map.py`); unknown for a cache made from a config
"""

from __future__ import annotations

import weakref

import torch
from torch import nn

from ..integration.device_map import layer_devices
from ..state import CacheState

_planned: weakref.WeakKeyDictionary[CacheState, list[torch.device] | None] = weakref.WeakKeyDictionary()
"""Places by the model, while some layer has no pages: finding them goes through all parameters."""


def places(state: CacheState) -> list[torch.device] | None:
    """The device of each paged layer; None if that is not known yet."""
    stores = [layer.store for layer in state.layers]
    if all(store is not None for store in stores):
        _planned.pop(state, None)
        return [store.device for store in stores if store is not None]
    if state not in _planned:
        model = None if state.model_or_config is None else state.model_or_config()
        _planned[state] = None
        if isinstance(model, nn.Module):
            layers = [layer.layer_idx for layer in state.layers]
            devices = layer_devices(model, max(layers) + 1)
            _planned[state] = [devices[layer] for layer in layers]
    return _planned[state]


def num_layers(state: CacheState, device: torch.device) -> int:
    """How many paged layers share the cap of a device: those on it, or all where that is not known."""
    found = places(state)
    return len(state.layers) if found is None or device not in found else found.count(device)
