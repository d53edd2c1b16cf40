"""The index operation on the pages of a layer: summaries from what the pages hold.

    pages [first, stop)  --method-->  summaries  -->  rows of the store

Whoever changes a complete page calls `index_pages`, or says that it is stale (`LayerState.invalidate`), which is dealt with
before the next step: of a prompt all pages are, as a method may cluster them first, and others where they took another form
or memory ran out. `check_summaries` compares with what the pages give.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..attention.methods.base import Method, Pages, Summaries
from ..attention.methods.clustering import ClusteringMethod
from ..errors import CacheStateError
from ..storage import permute_pages
from ..storage.chunked_array import put_all
from ..storage.page_store import PageStore
from ..storage.page_table import PageTable

if TYPE_CHECKING:
    from ..state import CacheState, LayerState

_BYTES_AT_ONCE = 1 << 30
"""Most bytes of pages that are worked on at a time, unless one layer has more: bounds temporary memory."""

_INDEX_TOKENS = 32768
"""Tokens indexed at a time, which bounds the temporary memory of a long prefill."""


def summarize_stale(state: CacheState) -> None:
    """Summarise, in all layers, the pages that are stale; what is not, for lack of memory, stays stale."""
    complete = state.sequences.length // state.sequences.page_size
    waiting: dict[tuple[int, int], list[LayerState]] = {}
    for layer in state.layers:
        if layer.stale_pages is not None:
            waiting.setdefault(layer.stale_pages, []).append(layer)
    for (first, stop), layers in waiting.items():
        end = min(stop, complete)
        if isinstance(state.method, ClusteringMethod) and state.method.multi_page_clusters:
            first, end = state.sequences.spans.around(first, end)
        for group in together(state, max(1, end - first), layers):
            if first < end:
                index_pages(stores_of(group), state.method, group[0].number, first, end)
            for layer in group:
                layer.stale_pages = None


def together(
    state: CacheState, num_pages: int, layers: list[LayerState] | None = None
) -> Iterator[list[LayerState]]:  # fmt: skip
    """Layers (all, unless some are given) whose pages are worked on in one call, as many as temporary memory allows."""
    groups: dict[Hashable, list[tuple[LayerState, PageStore]]] = {}
    for layer in state.layers if layers is None else layers:
        if layer.store is not None:
            apart = None if state.method.layers_alike else layer.number
            groups.setdefault((apart, permute_pages.alike(layer.store)), []).append((layer, layer.store))
    for group in groups.values():
        store = group[0][1]
        each = num_pages * state.sequences.batch_size * store.num_heads * store.backing.row_bytes
        at_once = max(1, _BYTES_AT_ONCE // max(1, each))
        for start in range(0, len(group), at_once):
            yield [layer for layer, _ in group[start : start + at_once]]


def stores_of(layers: list[LayerState]) -> list[PageStore]:
    """The pages of layers that have some."""
    return [layer.store for layer in layers if layer.store is not None]


def index_pages(
    stores: list[PageStore], method: Method, layer: int, first: int, stop: int, content: Tensor | None = None
) -> None:
    """Summarise the complete pages [first, stop) of all sequences of paged layers that are alike. Writes summaries.

    Partitions of several pages must lie inside.

    Args:
        layer: number of the only layer, or of one of those that the method treats alike.
        content: these pages as they are kept, [L * B, H, n, page elements], if somebody has read them already.
    """
    one = stores[0]
    whole = min(stop, max(first, one.sequences.spans.num_pages))
    at_once = max(1, _INDEX_TOKENS // one.page_size)
    parts = [(first, whole), *((start, min(start + at_once, stop)) for start in range(whole, stop, at_once))]
    for start, end in parts:
        if start < end:
            inside = None if content is None else content[:, :, start - first : end - first]
            rows, made = _summarise(stores, method, layer, start, end, inside)
            for name, vectors in made.items():
                summary = one.summaries[name]
                for which, kept in enumerate(summary.stored(vectors)):
                    arrays = [store.summaries[name].arrays[which] for store in stores]
                    put_all(arrays, rows, kept.unflatten(0, (len(stores), -1)))


def check_summaries(store: PageStore, method: Method, layer: int, layer_idx: int, exact: bool) -> None:
    """Raise CacheStateError where a summary is not what its page or partition gives.

    Args:
        layer_idx: the layer's number in the model, for the message.
        exact: whether to the last bit; else up to the rounding of another order of summation.
    """
    stop = store.sequences.length // store.page_size
    rows, expected = _summarise([store], method, layer, 0, stop)
    for name, vectors in expected.items():
        summary = store.summaries[name]
        held, vectors = summary.take(rows), summary.rounded(vectors)
        if not (_same(held, vectors) or (not exact and _close(held, vectors, summary.quantized))):
            raise CacheStateError(
                f"integrity: layer {layer_idx} has a stale summary {name!r}; please report this as a bug"
            )


def _summarise(
    stores: list[PageStore], method: Method, layer: int, first: int, stop: int, content: Tensor | None = None
) -> tuple[Tensor, Summaries]:
    """Rows [B, H, n] and summaries [L * B, H, n, ...] of the complete pages [first, stop), from their contents."""
    one, rows = stores[0], stores[0].rows(first, stop)
    if content is None:
        content = permute_pages.content(stores, first, stop)
    keys, values = one.backing_layout.take(content)
    valid, positions = tokens_of(one.sequences, first, stop, keys.device)
    if len(stores) > 1:
        valid = valid.repeat(len(stores), 1, 1, 1)
        positions = None if positions is None else positions.repeat(len(stores), 1, 1, 1)
    pages_per_cluster = None if one.permutation is None else permute_pages.pages_per_cluster(stores, first, stop).long()
    return rows, method.index_pages(Pages(keys, valid, (layer,), values, positions, pages_per_cluster))


def tokens_of(sequences: PageTable, first: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Of the tokens of pages [first, stop): which are no padding, and where they stand if a method asks: [B, 1, n, P]."""
    size = sequences.page_size
    tokens, shape = (first * size, stop * size), (sequences.batch_size, 1, stop - first, size)
    held, positions = sequences.mask.valid, None
    if held is None:
        valid = torch.ones(shape, dtype=torch.bool, device=device)
    else:
        valid = held[:, slice(*tokens)].to(device, non_blocking=True).reshape(shape)
    if sequences.mask.keeps_positions:
        positions = sequences.positions(*tokens, device).reshape(shape)
    return valid, positions


def _same(held: Tensor, expected: Tensor) -> bool:
    """Equal; what keys that are not numbers give is not a number either."""
    return torch.equal(held, expected) or bool(((held == expected) | (held.isnan() & expected.isnan())).all())


def _close(held: Tensor, expected: Tensor, quantized: bool) -> bool:
    """Equal but for the rounding of another order of summation, which kernels have: one step of int8 at most."""
    if not expected.numel():
        return True
    tolerance = (1 / 126 if quantized else 8 * torch.finfo(held.dtype).eps) * float(expected.abs().max())
    return torch.allclose(held.float(), expected.float(), rtol=0, atol=tolerance, equal_nan=True)
