"""A `Cache` over several rows, for one forward of the model with one token per row.

    RowsView
     └── layers[i]   PagedRows     keys and values [n, H, 1, D] are split; each row appends its own and attends to its own pages
                     WindowRows    windows of all rows side by side, shorter ones padded on the left
                     linear        transformers' own layer, with the rows' states stacked

The rows' own windows and states are not written: `write_back` gives each row its slice once the forward has returned. So a
forward that fails needs to be rolled back in the pages only.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer, LinearAttentionLayer

from ..attention.handed_states import hand_out
from ..attention.interface import MaskedLength, WindowWidth, register_layer
from ..errors import AttentionError
from ..forward_pass import never_attended
from ..graph.static_states import STATE_TABLES
from ..layer import SpinLayer
from .row import Row
from .row_errors import blaming


class RowsView(Cache):
    """The cache that the model is called with.

    Args:
        rows: index in the batch -> row, in the order of the forward's sequences.
        device: of the forward's inputs.
    """

    def __init__(self, rows: dict[int, Row], device: torch.device) -> None:
        self.rows = rows
        self.shared = SharedState(next(iter(rows.values())).state.model_name)
        number = len(next(iter(rows.values())).layers)
        super().__init__(layers=[self._layer(index, device) for index in range(number)])

    def _layer(self, index: int, device: torch.device) -> Any:
        of_rows = [row.layers[index] for row in self.rows.values()]
        if isinstance(of_rows[0], SpinLayer):
            return PagedRows(index, self.rows, self.shared)
        if type(of_rows[0]) is DynamicSlidingWindowLayer:
            return WindowRows(of_rows, [row.length for row in self.rows.values()], device)
        if type(of_rows[0]) is LinearAttentionLayer:
            return _stacked(of_rows)
        return of_rows[0]  # a placeholder

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest row. Positions of each row are given to the model."""
        return max(row.length for row in self.rows.values())

    def write_back(self) -> None:
        """Give each row its windows and states after the forward."""
        for number, row in enumerate(self.rows.values()):
            for layer, own in zip(self.layers, row.layers, strict=True):
                if isinstance(layer, WindowRows):
                    own.keys, own.values = layer.window_of(number)
                elif type(layer) is LinearAttentionLayer:
                    for name in STATE_TABLES:
                        for index, states in getattr(layer, name).items():
                            if states is not None:
                                getattr(own, name)[index] = states[number : number + 1]


class SharedState:
    """What attention asks of a cache, for all layers of one view.

    Args:
        model_name: in messages.
    """

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        self.pending: Any = None
        """The layer that was updated and has not attended yet."""

    def check_nothing_pending(self) -> None:
        """Raise AttentionError if a layer's new keys never reached the attention function."""
        lost, self.pending = self.pending, None
        if lost is not None:
            raise never_attended(self.model_name, lost.layer_idx)


class PagedRows(CacheLayerMixin):
    """One paged layer of all rows.

    Args:
        layer_idx: index in the model.
        rows: as for `RowsView`.
        shared: of the view.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, layer_idx: int, rows: dict[int, Row], shared: SharedState) -> None:
        self.layer_idx, self.rows, self.cache_state = layer_idx, rows, shared
        self.keys = self.values = None
        self.is_initialized = True
        self.of_rows: list[SpinLayer] = [row.layers[layer_idx] for row in rows.values()]
        self.handle = register_layer(self)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: every row holds tokens."""

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    def get_seq_length(self) -> int:
        """Tokens of the longest row."""
        return max(row.length for row in self.rows.values())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Sizes of a mask that only says that there is no padding."""
        return MaskedLength.of(query_length, None), 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Tag new keys [n, H, 1, Dk] and values with this layer. Nothing is stored until attention appends them."""
        self.check_shape(key_states, len(self.rows))
        for number, (row, layer) in enumerate(zip(self.rows.values(), self.of_rows, strict=True)):
            row.log.touch(self.layer_idx, row.layers)
            layer.update(key_states[number : number + 1], value_states[number : number + 1])
        self.cache_state.pending = self
        return hand_out(self, key_states, value_states)

    def check_shape(self, key_states: Tensor, num_rows: int) -> None:
        """Raise AttentionError unless there are new keys of one token for each row."""
        if key_states.shape[0] != num_rows or key_states.shape[2] != 1:
            raise AttentionError(
                f"layer {self.layer_idx}: expected keys of one token for each of {num_rows} rows, got shape "
                f"{tuple(key_states.shape)}; rows of this model cannot take steps together; use generate for each"
            )

    def take_pending(self) -> bool:
        """Whether `update` was called since the last attention. Clears the flag."""
        pending = self.cache_state.pending is self
        self.cache_state.pending = None
        taken = [layer.take_pending() for layer in self.of_rows]
        return pending and all(taken)

    def check_positions(self, position_ids: Tensor | None, mask: Tensor | None) -> None:
        """Nothing: the batch counts positions itself."""

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None, out: Tensor,
        append: bool, scale: float, softcap: float | None,
    ) -> None:  # fmt: skip
        """Append each row's token and attend to its pages. Arguments as for `SpinLayer.run`, with a sequence per row.

        Raises:
            BudgetError, CapacityError: a row does not fit; the message names it.
        """
        for number, (index, layer) in enumerate(zip(self.rows, self.of_rows, strict=True)):
            own = slice(number, number + 1)
            with blaming(index):
                layer.run(query[own], key[own], value[own], None, sinks, out[own], append, scale, softcap)

    def run_for_weights(self, *arguments: Any) -> Tensor:
        """Not available: rows have different lengths."""
        raise AttentionError(
            "expected a step over rows without attention weights, got output_attentions; call a cache alone for them"
        )

    def with_gradients(self, out: Tensor, *arguments: Any) -> Tensor:
        """`out`: steps over rows record no gradients."""
        return out

    def fail(self) -> None:
        """Mark the forward of each row as failed."""
        for layer in self.of_rows:
            layer.fail()


class WindowRows(CacheLayerMixin):
    """One sliding-window layer of all rows.

    Args:
        of_rows: the rows' own layers.
        lengths: tokens held by each row.
        device: of the forward.
    """

    is_sliding = True
    is_compileable = False

    def __init__(self, of_rows: list[DynamicSlidingWindowLayer], lengths: list[int], device: torch.device) -> None:
        self.sliding_window = of_rows[0].sliding_window
        self.lengths, self.widths = lengths, [layer.keys.shape[2] for layer in of_rows]
        self.is_initialized = True
        self.keys = _side_by_side([layer.keys for layer in of_rows])
        self.values = _side_by_side([layer.values for layer in of_rows])
        self.device = device

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: every row holds tokens."""

    def get_max_length(self) -> int:
        """The window."""
        return int(self.sliding_window)

    def get_seq_length(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The widest window with the new token, which tells what each row may attend to."""
        return WindowWidth.of(max(self.widths) + query_length, self.valid_tokens), 0

    def valid_tokens(self, mask_function: Callable[..., Tensor]) -> Tensor:
        """[n, width], bool: what the new token of each row attends to, by the model's mask function over positions."""
        width = max(self.widths) + 1
        last = torch.tensor(self.lengths, device=self.device)[:, None]
        positions = last - (width - 1) + torch.arange(width, device=self.device)
        row = torch.arange(len(self.lengths), device=self.device)[:, None]
        return mask_function(row, torch.zeros_like(row), last, positions) & (positions >= 0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new keys [n, H, 1, Dk] and values; returns all of the windows."""
        assert self.keys is not None
        assert self.values is not None
        self.keys = torch.cat([self.keys, key_states], 2)
        self.values = torch.cat([self.values, value_states], 2)
        return self.keys, self.values

    def window_of(self, number: int) -> tuple[Tensor, Tensor]:
        """Keys and values that the row with this number in the forward keeps. Views."""
        assert self.keys is not None
        assert self.values is not None
        first = max(self.keys.shape[2] - self.widths[number] - 1, self.keys.shape[2] - self.sliding_window + 1)
        return self.keys[number : number + 1, :, first:], self.values[number : number + 1, :, first:]


def _side_by_side(of_rows: list[Tensor]) -> Tensor:
    """[1, H, n_i, D] of each row as [rows, H, largest n, D], with zeros on the left of shorter ones."""
    width = max(states.shape[2] for states in of_rows)
    return torch.cat([torch.nn.functional.pad(states, (0, 0, width - states.shape[2], 0)) for states in of_rows])


def _stacked(of_rows: list[LinearAttentionLayer]) -> LinearAttentionLayer:
    """A layer with the states of all rows. Its tables and tensors are its own."""
    stacked = copy(of_rows[0])
    for name in STATE_TABLES:
        tables = [getattr(layer, name) for layer in of_rows]
        setattr(stacked, name, {
            index: None if states is None else torch.cat([table[index] for table in tables])
            for index, states in tables[0].items()
        })  # fmt: skip
    for name in (
        "has_previous_state",
        "is_conv_states_initialized",
        "is_recurrent_states_initialized",
        "conv_kernel_size",
    ):
        setattr(stacked, name, dict(getattr(stacked, name, {})))
    return stacked
