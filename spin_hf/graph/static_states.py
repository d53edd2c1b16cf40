"""Tensors of the layers that a captured step overwrites (windows, linear attention), at addresses that stay.

    before a step     what the layers hold  ->  the fixed tensors, which the layers then hold       bind
    the step          reads them; what it makes of them is copied back as its last launches         bind, while recording
    after it          windows count the token                                                       advance

A step of such layers can be done once only: what it overwrites is gone.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer


class StaticStates:
    """The fixed tensors of one captured step.

    Args:
        layers: the cache's layers.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.windows = windows_of(layers)
        self.places = [place for layer in overwritten(layers) for place in _places(layer)]
        self.tensors = [table[name].clone(memory_format=torch.contiguous_format) for table, name in self.places]

    def bind(self) -> None:
        """Before a step: what the layers hold now, at the fixed addresses."""
        for (table, name), tensor in zip(self.places, self.tensors, strict=True):
            if table[name] is not tensor:
                tensor.copy_(table[name])
                table[name] = tensor

    def advance(self, length: int) -> None:
        """After a step: windows count their tokens on the host."""
        for layer in self.windows:
            layer.cumulative_length = length


def overwritten(layers: list[Any]) -> list[Any]:
    """The layers whose tensors a step overwrites; all others are paged, or hold nothing."""
    return [layer for layer in layers if isinstance(layer, (DynamicSlidingWindowLayer, LinearAttentionLayer))]


def windows_of(layers: list[Any]) -> list[Any]:
    """The layers that keep a window."""
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
