"""Permutes tokens within pages of several layers in one call. The layers must share layout, head count and device.

    content [L, B, H, n, page elements]  --order-->  moved  -->  backing, shifts, pages per cluster;  frames drop these pages

Cost is bytes moved plus launches, so one call handles as many layers as temporary memory allows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from .. import kernels
from .page_store import PageStore
from .row_copies import Put, put_all, take_all, writers
from .token_permutation import TokenPermutation


def alike(store: PageStore) -> Hashable:
    """Key that is equal for stores whose pages can be permuted in one call."""
    return store.backing_layout, store.num_heads, store.backing.device, store.device


def content(stores: list[PageStore], first: int, stop: int) -> Tensor:
    """Pages [first, stop) of all sequences and heads in the backing layout: [L * B, H, n, page elements]."""
    return take_all([store.backing for store in stores], stores[0].rows(first, stop)).flatten(0, 1)


def positions(stores: list[PageStore], first: int, stop: int) -> Tensor:
    """Token at each place of pages [first, stop), which must lie in spans: [L * B, H, n, P], int32."""
    shifts, size = _shifts(stores, _rows(stores, first, stop)).flatten(0, 1), stores[0].page_size
    return shifts + torch.arange(first * size, stop * size, dtype=torch.int32, device=shifts.device).view(-1, size)


def pages_per_cluster(stores: list[PageStore], first: int, stop: int) -> Tensor:
    """Size in pages of the cluster that begins at each of pages [first, stop), 0 for none: [L * B, H, n], int64."""
    inside = max(first, min(stop, stores[0].sequences.spans.num_pages))
    rows = _rows(stores, first, inside)
    held = _sizes(stores, rows)
    if held is None:  # every cluster is one page
        return rows.new_ones((len(stores) * rows.shape[0], rows.shape[1], stop - first))
    held = held.flatten(0, 1).long()
    return torch.nn.functional.pad(held, (0, stop - inside), value=1)  # behind the spans every page is its own cluster


def write_runs(stores: list[PageStore], first: int, stop: int) -> None:
    """Note that pages [first, stop) of all sequences hold tokens in position order and are clusters of one page."""
    rows = _rows(stores, first, stop)
    put_all(_notes(stores, rows, *_runs(stores, rows)))


def permute_tokens(
    stores: list[PageStore], first: int, stop: int, order: Tensor, cluster_pages: Tensor | None, content: Tensor,
    marks: tuple[Callable[[], None], Callable[[], None]], are_runs: bool = False,
) -> Tensor:  # fmt: skip
    """Permute the tokens of pages [first, stop) of all sequences, in all layers or, on an error, in none.

    Drops these pages from the frames. Does not update summaries.

    Args:
        order: [L * B, H, tokens], int64, a permutation: place i gets the token at place order[i] of these pages. Sequences
            that share these pages must have equal rows.
        cluster_pages: [L * B, H, n], pages per cluster as in `pages_per_cluster`. Not read if every cluster is one page.
        content: the pages, from `content`.
        marks: functions that record success and failure. They must not allocate.
        are_runs: whether `write_runs` has noted these pages, and nothing has been permuted since.
    Returns:
        the permuted pages, like `content`.
    """
    one = stores[0]
    rows, each = _rows(stores, first, stop), (len(stores), -1)
    moved = kernels.move_tokens(content, order, one.page_size, one.backing_layout.token_fields)
    shifts = order - torch.arange(order.shape[2], device=order.device)
    before = _runs(stores, rows) if are_runs else (_shifts(stores, rows), _sizes(stores, rows))
    if not are_runs:
        shifts += before[0].flatten(0, 1).flatten(2).gather(2, order)
    sizes = None if cluster_pages is None else cluster_pages.unflatten(0, each)

    def puts(content: Tensor, shifts: Tensor, sizes: Tensor | None) -> list[Put]:
        pages = Put([store.backing for store in stores], rows, content.unflatten(0, each))
        return [pages, *_notes(stores, rows, shifts, sizes)]

    redo, undo = writers(puts(moved, shifts.view(before[0].shape), sizes), puts(content, *before))
    for store in stores:
        if store.frames is not None:
            store.frames.forget(first, stop)
    try:  # nothing here allocates
        redo()
        marks[0]()
        return moved
    except BaseException:
        undo()
        marks[1]()
        raise


def clustered(store: PageStore) -> TokenPermutation:
    """The token permutation of a store, which must have one."""
    assert store.permutation is not None
    return store.permutation


def _rows(stores: list[PageStore], first: int, stop: int) -> Tensor:
    """Rows of pages [first, stop) of all stores: [B, H, n], contiguous."""
    return stores[0].rows(first, stop).contiguous()


def _shifts(stores: list[PageStore], rows: Tensor) -> Tensor:
    """Shifts of rows [B, H, n] in spans: [L, B, H, n, P], int16."""
    return take_all([clustered(store).arrays[0] for store in stores], rows)


def _sizes(stores: list[PageStore], rows: Tensor) -> Tensor | None:
    """Pages per cluster of rows [B, H, n] in spans: [L, B, H, n], int16; None if every cluster is one page."""
    arrays = [array for store in stores for array in clustered(store).arrays[1:]]
    return take_all(arrays, rows) if arrays else None


def _runs(stores: list[PageStore], rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """`_shifts` and `_sizes` of pages in position order, each a cluster of its own."""
    shape = len(stores), *rows.shape
    shifts = torch.zeros((*shape, stores[0].page_size), dtype=torch.int16, device=rows.device)
    return shifts, shifts.new_ones(shape) if clustered(stores[0]).arrays[1:] else None


def _notes(stores: list[PageStore], rows: Tensor, shifts: Tensor, sizes: Tensor | None) -> list[Put]:
    """Puts of shifts [L, B, H, n, P] and pages per cluster [L, B, H, n] in rows [B, H, n] of all stores."""
    kinds = zip(*(clustered(store).arrays for store in stores), strict=True)
    return [Put(arrays, rows, held) for arrays, held in zip(kinds, (shifts, sizes), strict=False) if held is not None]
