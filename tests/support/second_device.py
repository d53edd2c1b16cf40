"""A second device on a CPU. torch takes "cpu:1" for the CPU, but as a device it differs from "cpu".

So a cache whose pages are on both has for each its own kernels, caps and groups of layers, as on two GPUs. Tensors do not
remember the device: what mixes those of both is only noticed on two GPUs (tests/gpu/test_device_maps.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spin_hf.backends import state_checks
from spin_hf.layer import SpinLayer
from spin_hf.memory import layer_places, plan

FIRST, SECOND = torch.device("cpu"), torch.device("cpu", 1)


class _Elsewhere:
    """States that say they are on the second device."""

    device = SECOND

    def __init__(self, states: Tensor) -> None:
        self._states = states

    def __getattr__(self, name: str) -> Any:
        return getattr(self._states, name)


def split_layers(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    """Let the pages of decoder layers from `first` on be on the second device, and caches know it from the model."""
    initialise, given = SpinLayer.lazy_initialization, state_checks._shape_given

    def elsewhere(layer: SpinLayer, keys: Any, values: Tensor) -> None:
        initialise(layer, keys if layer.layer_idx < first else _Elsewhere(keys), values)  # type: ignore[arg-type]

    def anywhere(key: Tensor, value: Tensor) -> tuple[object, ...]:
        return *given(key, value)[:-1], None

    def devices(model: Any, count: int) -> list[torch.device]:
        return [FIRST if index < first else SECOND for index in range(count)]

    monkeypatch.setattr(SpinLayer, "lazy_initialization", elsewhere)
    monkeypatch.setattr(state_checks, "_shape_given", anywhere)
    monkeypatch.setattr(state_checks, "_shape_of", lambda store: (*_shape(store), None))
    for module in (layer_places, plan):
        monkeypatch.setattr(module, "layer_devices", devices)


def _shape(store: Any) -> tuple[object, ...]:
    return store.num_heads, store.key_dim, store.value_dim, store.dtype
