"""Static tensors for the layers that a captured step overwrites: sliding windows and linear attention.

    before a step    copy the layers' tensors to the static ones, which replace them in the layers    bind
    in the step      read the static tensors; the last launches copy the new states back to them      bind, during capture
    after a step     windows count the token                                                          advance

A step of such layers cannot be repeated: it overwrites its inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer


class StaticStates:
    """The static tensors of one captured step.

    Args:
        layers: the cache's layers.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.windows = windows_of(layers)
        self.places = [place for layer in overwritten(layers) for place in _places(layer)]
        self.tensors = [table[name].clone(memory_format=torch.contiguous_format) for table, name in self.places]

    def bind(self) -> None:
        """Copy the layers' current tensors to the static ones, and put these into the layers."""
        for (table, name), tensor in zip(self.places, self.tensors, strict=True):
            if table[name] is not tensor:
                tensor.copy_(table[name])
                table[name] = tensor

    def advance(self, length: int) -> None:
        """Set the windows' token count, which is on the host, after a step."""
        for layer in self.windows:
            layer.cumulative_length = length


def overwritten(layers: list[Any]) -> list[Any]:
    """The layers with tensors that a step overwrites. All others are paged or empty."""
    return [layer for layer in layers if isinstance(layer, (DynamicSlidingWindowLayer, LinearAttentionLayer))]


def windows_of(layers: list[Any]) -> list[Any]:
    """The sliding-window layers."""
    return [layer for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]


def _places(layer: Any) -> list[tuple[dict[Any, Any], Any]]:
    if isinstance(layer, DynamicSlidingWindowLayer):
        return [(layer.__dict__, "keys"), (layer.__dict__, "values")]
    return [
        (table, index)
        for table in (layer.conv_states, layer.recurrent_states)
        for index, tensor in table.items()
        if tensor is not None
    ]
