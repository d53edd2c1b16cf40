"""Windows and linear states of the rows of a batch, in tensors that keep their addresses, so that a captured step can use them.

    StaticWindow    keys and values [R, H, window - 1, D], the last token at the right; shorter rows are zero on the left
    linear          transformers' own layer with states [R, ...], which it writes in place

A row's own layer holds a view of its part. `put` copies a cache's window to a row; `Row.own_states` gives the cache tensors of
its own again.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer, LinearAttentionLayer

from ..attention.interface import MaskedLength, WindowWidth
from ..graph.static_states import STATE_TABLES


class StaticWindow(CacheLayerMixin):
    """One sliding-window layer of all rows.

    Args:
        like: the layer of any row.
        num_rows: rows, empty ones included.
        positions: int64 [num_rows, 1], of the new tokens; read in each step.
    """

    is_sliding = True
    is_compileable = False

    def __init__(self, like: DynamicSlidingWindowLayer, num_rows: int, positions: Tensor) -> None:
        self.width, self.positions, self.is_initialized = like.sliding_window - 1, positions, True
        self.all_full = False
        """Whether all rows attend to the whole window in this step, so that no mask is needed."""
        self.keys, self.values = (_zeros(states, num_rows, self.width) for states in (like.keys, like.values))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the tensors exist."""

    def get_max_length(self) -> int:
        """The window."""
        return self.width + 1

    def get_seq_length(self) -> int:
        """The window: positions of each row are given to the model."""
        return self.width + 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The window's width, which tells what each row may attend to."""
        if self.all_full:
            return MaskedLength.of(self.width + query_length, None, window=True), 0
        return WindowWidth.of(self.width + query_length, self.valid_tokens), 0

    def valid_tokens(self, mask_function: Callable[..., Tensor]) -> Tensor:
        """[R, width + 1], bool: what the new token of each row attends to, by the model's mask function over positions."""
        device = self.positions.device
        places = self.positions - self.width + torch.arange(self.width + 1, device=device)
        row = torch.arange(len(self.positions), device=device)[:, None]
        return mask_function(row, torch.zeros_like(row), self.positions, places) & (places >= 0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new keys [R, H, 1, D] and values in place; returns the windows with the token that leaves them."""
        found = []
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            whole = torch.cat([held, new], 2)
            held.copy_(whole[:, :, 1:])
            found.append(whole)
        return found[0], found[1]

    def put(self, row: int, own: DynamicSlidingWindowLayer) -> None:
        """Copy a cache's window to a row."""
        for name, held in (("keys", self.keys), ("values", self.values)):
            states = getattr(own, name)
            held[row].zero_()
            held[row, :, self.width - states.shape[2] :] = states[0]
            setattr(own, name, self._view(held, row, states.shape[2]))

    def count(self, row: int, own: DynamicSlidingWindowLayer, length: int) -> None:
        """Let a cache's layer hold one token more, if its window is not full.

        Args:
            length: tokens of the row with the new one.
        """
        own.cumulative_length = length
        if own.keys.shape[2] < self.width:
            number = own.keys.shape[2] + 1
            own.keys, own.values = self._view(self.keys, row, number), self._view(self.values, row, number)

    def _view(self, held: Tensor, row: int, number: int) -> Tensor:
        return held[row : row + 1, :, self.width - number :]

    def tensors(self) -> list[Tensor]:
        """What a step overwrites."""
        return [self.keys, self.values]


def _zeros(states: Tensor, num_rows: int, width: int) -> Tensor:
    return states.new_zeros((num_rows, states.shape[1], width, states.shape[3]))


def static_linear(like: LinearAttentionLayer, num_rows: int) -> LinearAttentionLayer:
    """A layer like that of any row, with states of its own for all rows, of zeros."""
    made = copy(like)
    for name in STATE_TABLES:
        table = {
            index: None if states is None else states.new_zeros((num_rows, *states.shape[1:]))
            for index, states in getattr(like, name).items()
        }
        setattr(made, name, table)
    for name, held in list(made.__dict__.items()):
        if isinstance(held, dict) and name not in STATE_TABLES:
            setattr(made, name, dict(held))
    return made


def put_linear(static: LinearAttentionLayer, row: int, own: LinearAttentionLayer) -> None:
    """Copy a cache's states to a row."""
    for name in STATE_TABLES:
        table = getattr(own, name)
        for index, states in getattr(static, name).items():
            if states is not None:
                states[row] = table[index][0]
                table[index] = states[row : row + 1]


def linear_tensors(static: LinearAttentionLayer) -> list[Tensor]:
    """What a step overwrites."""
    return [states for name in STATE_TABLES for states in getattr(static, name).values() if states is not None]
