"""What a fork takes from layers without pages: keys and values that transformers replaces are shared, others are copied."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def fork_states(layers: list[Any], memo: dict[int, Any]) -> None:
    """Add the keys and values of transformers' own layers to a memo for `deepcopy`.

    full attention    shared: every update makes new tensors
    window            copied, without the tokens before it: a replayed step writes into it
    others            left to `deepcopy`: linear attention writes into its states
    """
    for layer in layers:
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            for states in (layer.keys, layer.values):
                if isinstance(states, Tensor):
                    memo[id(states)] = states if type(layer) is DynamicLayer else states.clone()
