"""One sequence of a batch of rows: its cache, and the parts of that cache that a step over several rows uses.

Row ── cache    SpinCache of one sequence
     ├ state    options, page table, committed tokens
     ├ passes   begin, commit and roll back of a forward
     └ log      what the forward in progress has changed
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

from ..backends.row_descriptors import RowDescriptors
from ..cache import SpinCache
from ..config import SpinOptions
from ..errors import BatchSizeError, CacheStateError, OptionError, OptionTypeError, UnsupportedModelError
from ..graph.static_states import own_states, windows_of
from ..integration.layer_types import is_placeholder, rope_depends_on_length
from ..layer import SpinLayer


class Row:
    """A cache that takes part in steps over several caches.

    Args:
        cache: of one sequence, with a token at least.
    """

    def __init__(self, cache: SpinCache) -> None:
        self.cache = cache
        self.state, self.passes, self.log = cache._state, cache._passes, cache._log
        self.seated_in: Any = None
        """The program whose tensors hold the windows and states of this row; None if they are the cache's own."""
        self.descriptors: dict[Any, RowDescriptors] = {}
        """By device and number of KV heads of layers, if kernels serve the cache."""
        self.kind: tuple[int, int] | None = None
        """Version of the page layout, and the number of what rows of one launch have in common (`RowSteps`)."""

    @property
    def layers(self) -> list[Any]:
        """The cache's layers."""
        return self.cache.layers

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.state.committed

    def settle(self) -> None:
        """Complete or undo what an interrupted forward or operation has left."""
        self.log.settle(self.layers)

    def check_room(self) -> None:
        """Raise BudgetError or CapacityError if another token does not fit the caps."""
        self.state.sequences.check_room(self.length, 1)

    def take_back(self, held: int) -> None:
        """Remove the token of a step that has been committed. Only paged layers have it yet.

        Args:
            held: tokens before the step.
        """
        if self.state.committed != held:
            self.passes.roll_back(held)

    def end(self, length: int, ids: Tensor) -> None:
        """Note a step that every row has finished.

        Args:
            length: tokens before it.
            ids: [1, 1], int32, the token.
        """
        self.state.tokens = self.state.tokens.recorded(length, ids)
        if self.seated_in is None:
            for layer in windows_of(self.layers):
                layer.cumulative_length = length + 1

    def own_states(self) -> None:
        """Give the cache windows and states that share no memory with other rows."""
        own_states(self.layers)
        self.seated_in = None

    def leave(self) -> SpinCache:
        """The cache, which does not depend on the batch any more."""
        self.own_states()
        for descriptors in self.descriptors.values():
            if descriptors.counts is not None:
                self.passes.backends.add_counts(descriptors.counts)
        self.descriptors = {}
        return self.cache


def check_cache(cache: Any, model: nn.Module) -> None:
    """Raise an error if a cache cannot be a row of a batch of `model`. Nothing has changed.

    Raises:
        OptionTypeError, OptionError, BatchSizeError, CacheStateError, UnsupportedModelError: with the reason and the remedy.
    """
    if not isinstance(cache, SpinCache):
        raise OptionTypeError(
            f"cache: expected a SpinCache, got {type(cache).__name__}; make one with SpinCache(model)"
        )
    row = Row(cache)
    row.settle()
    name = row.state.model_name
    _check_layers(name, row)
    if cache.calls.model() is not model:
        raise OptionError(
            f"cache: expected a SpinCache of the {type(model).__name__} of this batch, got one of another {name} object, or of "
            "a config; make it with SpinCache(model)"
        )
    if not row.length:
        raise CacheStateError(
            "cache: expected a cache that holds a prompt, got an empty one; call the model with it first"
        )
    if row.state.sequences.batch_size != 1:
        raise BatchSizeError(
            f"cache: expected one sequence, got {row.state.sequences.batch_size}; use a SpinCache for each sequence, for "
            "example forks with batch_select_indices([i])"
        )
    valid = row.state.sequences.mask.valid
    if valid is not None and not bool(valid.all()):
        raise BatchSizeError("cache: expected a sequence without padding, got padding; call the model without a mask")
    for layer in row.layers:
        if getattr(layer, "record_past", False):
            raise CacheStateError(
                "cache: expected windows and states that do not record the past, got some of assisted generation; make a "
                "new SpinCache of the sequence"
            )


def _check_layers(name: str, row: Row) -> None:
    """Raise UnsupportedModelError if rows of the model of this name cannot take steps together."""
    if not row.state.layers:
        raise UnsupportedModelError(
            f"{name} has no paged layers, expected one at least; use generate for each sequence, or for one batch"
        )
    for layer in row.layers:
        served = isinstance(layer, SpinLayer) or type(layer) in (DynamicSlidingWindowLayer, LinearAttentionLayer)
        if not served and not is_placeholder(layer):
            raise UnsupportedModelError(
                f"{name} has a cache layer {type(layer).__name__}, expected pages, sliding windows or states of linear "
                "attention; use generate for each sequence, or for one batch"
            )
    if getattr(row.cache.calls.config, "attn_temperature_tuning", False):
        raise UnsupportedModelError(
            f"{name} scales queries by the number of tokens that the cache holds, expected the same for all rows; use generate "
            "for each sequence"
        )
    if rope_depends_on_length(row.cache.calls.config):
        raise UnsupportedModelError(
            f"{name} rotates keys by frequencies that depend on the length of the text, expected the same for all rows; use "
            "generate for each sequence"
        )


def check_alike(row: Row, other: Row) -> None:
    """Raise OptionError if rows select pages in different ways. Caps on memory may differ."""
    for what, got, expected in (
        ("method", row.state.method, other.state.method),
        ("options", of_steps(row.state.options), of_steps(other.state.options)),
    ):
        if got != expected:
            raise OptionError(
                f"cache: expected the {what} of the other rows, {expected}, got {got}; make all caches of a batch alike"
            )


def of_steps(options: SpinOptions) -> SpinOptions:
    """Options without those that steps of one token do not depend on."""
    return replace(
        options, gpu_memory=None, cpu_memory=None, prefill_chunk_size=None, prefill="dense", prefill_top_p=0.9
    )
