"""Calls of linear-attention and convolution layers on a cache: logged, so that a forward that fails can be rolled back."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from ..inference_mode import outside_inference_mode


class LinearStates(Cache):
    """The calls. A subclass has `_log` (`forward_log.py`) and `_before`, which logs a change."""

    _log: Any
    _before: Any

    @outside_inference_mode
    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """As in transformers, for linear-attention and convolution layers."""
        self._before(layer_idx, conv_states.shape[0])
        states = super().update_conv_state(conv_states, layer_idx, *args, **kwargs)
        self._log.touched(layer_idx, self.layers)
        return states

    @outside_inference_mode
    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """As in transformers, for linear-attention layers."""
        self._before(layer_idx, recurrent_states.shape[0])
        states = super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)
        self._log.touched(layer_idx, self.layers)
        return states

    def get_conv_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor | None:
        """As in transformers. Convolution layers write single tokens into the returned tensor."""
        return self._writable(layer_idx, super().get_conv_state(layer_idx, *args, **kwargs))

    def get_recurrent_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor | None:
        """As in transformers. Layers may write into the returned tensor."""
        return self._writable(layer_idx, super().get_recurrent_state(layer_idx, *args, **kwargs))

    def has_previous_state(self, *args: Any, **kwargs: Any) -> bool:
        """As in transformers. Linear-attention layers may then write into their states without another call."""
        self._log.may_begin(self.layers)
        return super().has_previous_state(*args, **kwargs)

    def _writable(self, index: int, state: Tensor | None) -> Tensor | None:
        if state is not None and self._log.last >= 0:  # `generate` reads between two forwards, too
            self._before(index, state.shape[0])
            self._log.touched(index, self.layers)
        else:
            self._log.may_begin(self.layers)
        return state
