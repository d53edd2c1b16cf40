"""Summaries of a layer's complete pages: made as pages fill, and held against what the pages give.

pages [first, stop) of the store, their validity and positions  ->  Method.index_pages  ->  rows of the summaries
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention.partition import Method, Pages, Summaries
from .errors import CacheStateError
from .storage.pages import PageStore

_INDEX_TOKENS = 32768
"""Tokens indexed at a time, which bounds the temporary memory of a long prefill."""


def index_pages(store: PageStore, method: Method, layer: int, first: int, stop: int) -> None:
    """Summarise the complete pages [first, stop) of all sequences of the paged layer number `layer`. Writes summaries."""
    at_once = max(1, _INDEX_TOKENS // store.page_size)
    for start in range(first, stop, at_once):
        rows, summaries = _summarise(store, method, layer, start, min(start + at_once, stop))
        for name, vectors in summaries.items():
            store.summaries[name].put(rows, vectors)


def check_summaries(store: PageStore, method: Method, layer: int, layer_idx: int, exact: bool) -> None:
    """Raise CacheStateError where a summary is not what its page gives.

    Args:
        layer_idx: the layer's number in the model, for the message.
        exact: whether to the last bit; else up to the rounding of another order of summation.
    """
    rows, expected = _summarise(store, method, layer, 0, store.sequences.length // store.page_size)
    for name, vectors in expected.items():
        summary = store.summaries[name]
        held, vectors = summary.take(rows), summary.rounded(vectors)
        if not (torch.equal(held, vectors) or (not exact and _close(held, vectors, summary.quantized))):
            raise CacheStateError(
                f"integrity: layer {layer_idx} has a stale summary {name!r}; please report this as a bug"
            )


def _summarise(store: PageStore, method: Method, layer: int, first: int, stop: int) -> tuple[Tensor, Summaries]:
    """Rows [B, H, n] and summaries of the complete pages [first, stop), from their contents."""
    sequences = store.sequences
    keys, _, rows = store.pages(first, stop)
    shape = (keys.shape[0], 1, stop - first, store.page_size)
    tokens = slice(first * store.page_size, stop * store.page_size)
    if sequences.mask.valid is None:
        valid = keys.new_ones(shape, dtype=torch.bool)
    else:
        valid = sequences.mask.valid[:, tokens].to(keys.device).reshape(shape)
    positions = None
    if sequences.mask.keeps_positions:
        positions = sequences.positions(tokens.start, tokens.stop, keys.device).reshape(shape)
    return rows, method.index_pages(Pages(keys, valid, layer, positions))


def _close(held: Tensor, expected: Tensor, quantized: bool) -> bool:
    """Equal but for the rounding of another order of summation, which kernels have: one step of int8 at most."""
    tolerance = (1 / 126 if quantized else 8 * torch.finfo(held.dtype).eps) * float(expected.abs().max())
    return torch.allclose(held.float(), expected.float(), rtol=0, atol=tolerance, equal_nan=True)
