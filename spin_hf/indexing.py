"""The index operation on the pages of a layer: summaries from what the pages hold.

    pages [first, stop)  --method-->  summaries  -->  rows of the store

Whoever changes a complete page calls `index_pages`, and `index_recoded` where all of them may have changed; `check_summaries`
holds what is kept against what the pages give.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .attention.partition import Method, Pages, Summaries
from .errors import CacheStateError
from .storage.pages import PageStore
from .storage.sequences import Sequences

if TYPE_CHECKING:
    from .shared import SharedState

_INDEX_TOKENS = 32768
"""Tokens indexed at a time, which bounds the temporary memory of a long prefill."""


def index_pages(store: PageStore, method: Method, layer: int, first: int, stop: int) -> None:
    """Summarise the complete pages [first, stop) of all sequences of the paged layer number `layer`. Writes summaries.

    Partitions of several pages must lie inside.
    """
    whole = min(stop, max(first, store.sequences.stretches.num_pages))
    at_once = max(1, _INDEX_TOKENS // store.page_size)
    parts = [(first, whole), *((start, min(start + at_once, stop)) for start in range(whole, stop, at_once))]
    for start, end in parts:
        if start < end:
            rows, summaries = _summarise(store, method, layer, start, end)
            for name, vectors in summaries.items():
                store.summaries[name].put(rows, vectors)


def index_recoded(shared: SharedState) -> None:
    """Summarise anew where pages went to the cpu tier in another form, so that summaries are of what will be read there."""
    if not shared.options.host_int8:
        return
    for layer in shared.layers:
        store = layer.store
        if store is not None and store.recoded:
            index_pages(store, shared.method, layer.number, 0, store.length // store.page_size)
            store.recoded = False


def check_summaries(store: PageStore, method: Method, layer: int, layer_idx: int, exact: bool) -> None:
    """Raise CacheStateError where a summary is not what its page or partition gives.

    Args:
        layer_idx: the layer's number in the model, for the message.
        exact: whether to the last bit; else up to the rounding of another order of summation.
    """
    stop = store.sequences.length // store.page_size
    rows, expected = _summarise(store, method, layer, 0, stop)
    for name, vectors in expected.items():
        summary = store.summaries[name]
        held, vectors = summary.take(rows), summary.rounded(vectors)
        if not (torch.equal(held, vectors) or (not exact and _close(held, vectors, summary.quantized))):
            raise CacheStateError(
                f"integrity: layer {layer_idx} has a stale summary {name!r}; please report this as a bug"
            )


def _summarise(store: PageStore, method: Method, layer: int, first: int, stop: int) -> tuple[Tensor, Summaries]:
    """Rows [B, H, n] and summaries of the complete pages [first, stop), from their contents."""
    keys, values, rows = store.pages(first, stop)
    valid, positions = tokens_of(store.sequences, first, stop, keys.device)
    partition_pages = None
    if store.regrouped is not None:
        partition_pages = store.regrouped.partition_pages(first, stop)
    return rows, method.index_pages(Pages(keys, valid, layer, values, positions, partition_pages))


def tokens_of(sequences: Sequences, first: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
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


def _close(held: Tensor, expected: Tensor, quantized: bool) -> bool:
    """Equal but for the rounding of another order of summation, which kernels have: one step of int8 at most."""
    if not expected.numel():
        return True
    tolerance = (1 / 126 if quantized else 8 * torch.finfo(held.dtype).eps) * float(expected.abs().max())
    return torch.allclose(held.float(), expected.float(), rtol=0, atol=tolerance, equal_nan=True)
