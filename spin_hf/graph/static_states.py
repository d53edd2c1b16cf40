"""Static tensors for the layers that a captured step overwrites: sliding windows and linear attention.

    before a step    copy the layers' tensors to the static ones, which replace them in the layers    bind
    in the step      read the static tensors; the last launches copy the new states back to them      bind, during capture
    after a step     windows count the token                                                          advance
    another cache    the layers get tensors of their own; the next step binds those of that cache     detach

A step of such layers cannot be repeated: it overwrites its inputs.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

STATE_TABLES = ("conv_states", "recurrent_states")
"""Attributes of linear-attention layers that hold states: index -> tensor or None."""

Place = tuple[dict[Any, Any], Any]
"""A table, and the key in it of a tensor of a layer."""


class StaticStates:
    """The static tensors of one captured step.

    Args:
        layers: the layers of the cache that it is captured for.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.tensors = [table[name].clone(memory_format=torch.contiguous_format) for table, name in _all_places(layers)]
        self._layers: list[weakref.ref[Any]] = []
        """The layers that hold static tensors: those of the latest `bind`."""

    def bind(self, layers: list[Any]) -> None:
        """Copy the current tensors of a cache's layers to the static ones, and put these into the layers."""
        for (table, name), tensor in zip(_all_places(layers), self.tensors, strict=True):
            if table[name] is not tensor:
                tensor.copy_(table[name])
                table[name] = tensor
        self._layers = [weakref.ref(layer) for layer in overwritten(layers)]

    def detach(self) -> None:
        """Give the layers tensors of their own, as another cache will use the static ones."""
        layers = [layer for layer in (reference() for reference in self._layers) if layer is not None]
        for table, name in _all_places(layers):
            if any(table[name] is tensor for tensor in self.tensors):
                table[name] = table[name].clone()
        self._layers = []


def advance(layers: list[Any], length: int) -> None:
    """Set the windows' token count, which is on the host, after a step."""
    for layer in windows_of(layers):
        layer.cumulative_length = length


def layout_of(layers: list[Any]) -> tuple[Any, ...]:
    """What static tensors for these layers have to be like."""
    kinds = tuple(type(layer) for layer in overwritten(layers))
    tensors = (table[name] for table, name in _all_places(layers))
    return kinds, tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)


def overwritten(layers: list[Any]) -> list[Any]:
    """The layers with tensors that a step overwrites. All others are paged or empty."""
    return [layer for layer in layers if isinstance(layer, (DynamicSlidingWindowLayer, LinearAttentionLayer))]


def windows_of(layers: list[Any]) -> list[Any]:
    """The sliding-window layers."""
    return [layer for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]


def _all_places(layers: list[Any]) -> list[Place]:
    return [place for layer in overwritten(layers) for place in _places(layer)]


def _places(layer: Any) -> list[Place]:
    if isinstance(layer, DynamicSlidingWindowLayer):
        return [(layer.__dict__, "keys"), (layer.__dict__, "values")]
    return [
        (table, index)
        for table in (getattr(layer, name) for name in STATE_TABLES)
        for index, tensor in table.items()
        if tensor is not None
    ]


def own_states(layers: list[Any]) -> None:
    """Give layers tensors of their own, in place of views of larger ones."""
    for table, name in _all_places(layers):
        table[name] = table[name].clone(memory_format=torch.contiguous_format)
