"""Summaries: computes them from pages and keeps them up to date.

    pages [first, stop)  --method-->  summaries  -->  rows of the store

Code that changes a full page either re-indexes it (`index_pages`) or marks it stale (`LayerState.invalidate`). Stale pages are
summarized before the next step. A prefill marks all its pages stale, because clustering may move their tokens first. A change
of storage layout, or an out-of-memory error, also leaves pages stale. `check_summaries` recomputes and compares.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..attention.methods.base import Method, Pages, Summaries
from ..attention.methods.clustering import ClusteringMethod
from ..errors import require_integrity
from ..storage import permute_pages
from ..storage.page_store import PageStore
from ..storage.page_table import PageTable
from ..storage.row_copies import Put, put_all
from .fit import fitted_of

if TYPE_CHECKING:
    from ..state import CacheState, LayerState

_INDEX_TOKENS = 32768
"""Tokens summarized at a time. Bounds the temporary memory of a long prefill."""


def summarize_stale(state: CacheState) -> None:
    """Summarize the stale pages of all layers. If memory runs out, the rest stays stale."""
    complete = state.sequences.length // state.sequences.page_size
    waiting: dict[tuple[int, int], list[LayerState]] = {}
    for layer in state.layers:
        if layer.stale_pages is not None:
            waiting.setdefault(layer.stale_pages, []).append(layer)
    for (first, stop), layers in waiting.items():
        end = min(stop, complete)
        if _has_clusters(state.method):
            first, end = state.sequences.spans.around(first, end)
        if first < end:
            state.sequences.own(range(first, end))
        at_once = max(1, end - first) if _has_clusters(state.method) else _pages_at_once(state)
        for group in together(state, max(1, min(end - first, at_once)), layers):
            if first < end:
                index_pages(group, state.method, first, end, at_once=at_once)
            for layer in group:
                layer.stale_pages = None


def together(state: CacheState, num_pages: int, layers: list[LayerState] | None = None) -> Iterator[list[LayerState]]:
    """Batches of layers whose pages can be processed in one call, as many as temporary memory allows.

    Args:
        num_pages: pages per sequence that the call processes.
        layers: default: all layers. Layers without pages are skipped.
    """
    groups: dict[Hashable, list[tuple[LayerState, PageStore]]] = {}
    for layer in state.layers if layers is None else layers:
        if layer.store is not None:
            apart = None if state.method.layers_alike else layer.number
            groups.setdefault((apart, permute_pages.alike(layer.store)), []).append((layer, layer.store))
    for group in groups.values():
        store = group[0][1]
        each = num_pages * state.sequences.batch_size * store.num_heads * store.backing.row_bytes
        at_once = max(1, index_room(state, store) // max(1, each))
        for start in range(0, len(group), at_once):
            yield [layer for layer, _ in group[start : start + at_once]]


def index_room(state: CacheState, store: PageStore) -> int:
    """Most bytes of pages that are clustered or summarized in one call, unless one layer has more."""
    return state.options.tuning.index_room(state.free_memory(store.device))


def pages_that_fit(state: CacheState) -> int | None:
    """Pages of all sequences, of the largest layer, in `index_room`; None if free memory is not known."""
    stores = [layer.store for layer in state.layers if layer.store is not None]
    free = state.free_memory(stores[0].device) if stores else None
    if free is None:
        return None
    largest = max(store.num_heads * store.backing.row_bytes for store in stores)
    return state.options.tuning.index_room(free) // (largest * max(1, state.sequences.batch_size))


def _pages_at_once(state: CacheState) -> int:
    """Pages per sequence that are summarized in one call: whole units."""
    size, each = state.sequences.page_size, state.method.unit_pages
    fitting, most = pages_that_fit(state), _INDEX_TOKENS // size
    return max(1, (most if fitting is None else min(most, fitting)) // each) * each


def _has_clusters(method: Method) -> bool:
    """Whether a cluster may have several pages, which are summarized together."""
    return isinstance(method, ClusteringMethod) and method.multi_page_clusters


def stores_of(layers: list[LayerState]) -> list[PageStore]:
    """Page stores of the layers that have one."""
    return [layer.store for layer in layers if layer.store is not None]


def index_pages(
    layers: list[LayerState], method: Method, first: int, stop: int, content: Tensor | None = None,
    at_once: int | None = None,
) -> None:  # fmt: skip
    """Summarize the full pages [first, stop) of all sequences, and the rest of their units. Writes summaries.

    Clusters must not cross `first` or `stop`.

    Args:
        layers: from one batch of `together`.
        content: these pages in the backing layout, [L * B, H, n, page elements], if already read. They are whole units.
        at_once: pages that are read at a time, whole units; None for `_INDEX_TOKENS`.
    """
    stores = stores_of(layers)
    one = stores[0]
    if content is None:
        first, stop = _whole_units(first, stop, one.sequences.length // one.page_size, method.unit_pages)
    in_spans = first
    if content is not None or _has_clusters(method):  # at once: clusters must not be cut, and what is read is read
        in_spans = min(stop, max(first, one.sequences.spans.num_pages))
    at_once = max(1, _INDEX_TOKENS // one.page_size) if at_once is None else at_once
    ranges = [(first, in_spans), *((start, min(start + at_once, stop)) for start in range(in_spans, stop, at_once))]
    for start, end in ranges:
        if start < end:
            inside = None if content is None else content[:, :, start - first : end - first]
            rows, made = _summarize(layers, method, start, end, inside)
            puts = []
            for name, vectors in made.items():
                summary = one.summaries[name]
                held = summary.rows_of(rows)
                for which, encoded in enumerate(summary.stored(vectors)):
                    arrays = [store.summaries[name].arrays[which] for store in stores]
                    puts.append(Put(arrays, held, encoded.unflatten(0, (len(stores), -1))))
            put_all(puts)


def check_summaries(layer: LayerState, method: Method, exact: bool) -> None:
    """Raise CacheStateError if a stored summary differs from one recomputed from its page or cluster.

    Args:
        exact: compare bitwise; else allow for rounding by another order of summation.
    """
    store = layer.store
    assert store is not None
    stop = store.sequences.length // store.page_size
    rows, expected = _summarize([layer], method, 0, stop)
    for name, vectors in expected.items():
        summary = store.summaries[name]
        held, vectors = summary.take(summary.rows_of(rows)), summary.rounded(vectors)
        fresh = _same(held, vectors) or (not exact and _close(held, vectors, summary.quantized))
        require_integrity(fresh, f"layer {layer.layer_idx} has a stale summary {name!r}")


def invalidate_last_unit(state: CacheState, length: int) -> None:
    """Mark the summaries of the last unit of `length` tokens as stale, before a crop to them, if it loses pages."""
    size, each = state.sequences.page_size, state.method.unit_pages
    stop = length // size
    if stop % each and state.sequences.length // size > stop:
        for layer in state.layers:
            layer.invalidate(stop // each * each, stop)


def _whole_units(first: int, stop: int, num_pages: int, each: int) -> tuple[int, int]:
    """Pages [first, stop), extended to whole units of `each` pages as far as there are full pages."""
    return first // each * each, max(stop, min(-(-stop // each) * each, num_pages))


def _summarize(
    layers: list[LayerState], method: Method, first: int, stop: int, content: Tensor | None = None
) -> tuple[Tensor, Summaries]:  # fmt: skip
    """Rows [B, H, n] and newly computed summaries [L * B, H, n, ...] of the full pages [first, stop)."""
    stores = stores_of(layers)
    one, rows = stores[0], stores[0].rows(first, stop).contiguous()
    if content is None:
        content = permute_pages.content(stores, first, stop)
    keys, values = one.backing_layout.take(content)
    valid, positions = tokens_of(one.sequences, first, stop, keys.device)
    if len(stores) > 1:
        valid = valid.repeat(len(stores), 1, 1, 1)
        positions = None if positions is None else positions.repeat(len(stores), 1, 1, 1)
    pages_per_cluster = None if one.permutation is None else permute_pages.pages_per_cluster(stores, first, stop)
    fitted = fitted_of(layers, method)
    return rows, method.index_pages(
        Pages(keys, valid, (layers[0].number,), values, positions, pages_per_cluster, fitted)
    )


def tokens_of(sequences: PageTable, first: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Validity (bool) and positions (int64) of the tokens of pages [first, stop): [B, 1, n, P] each.

    Positions are None unless the page table stores them.
    """
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
    """Equal, with NaN equal to NaN."""
    return torch.equal(held, expected) or bool(((held == expected) | (held.isnan() & expected.isnan())).all())


def _close(held: Tensor, expected: Tensor, quantized: bool) -> bool:
    """Equal up to rounding by a kernel's order of summation: at most one int8 step if quantized."""
    if not expected.numel():
        return True
    if not held.is_floating_point():  # codes: rounding decides those of numbers in the middle between two levels
        return float((held != expected).float().mean()) < 0.01
    tolerance = (1 / 126 if quantized else 8 * torch.finfo(held.dtype).eps) * float(expected.abs().max())
    return torch.allclose(held.float(), expected.float(), rtol=0, atol=tolerance, equal_nan=True)
