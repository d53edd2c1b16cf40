"""Permutes tokens within pages of several layers in one call. The layers must share layout, head count and device.

    content [L, B, H, n, page elements]  --order-->  moved  -->  backing, shifts, pages per cluster;  frames drop these pages

Cost is bytes moved plus launches, so one call handles as many layers as temporary memory allows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from .. import kernels
from .chunked_array import take_all, writers
from .page_store import PageStore
from .token_permutation import TokenPermutation


def alike(store: PageStore) -> Hashable:
    """Key that is equal for stores whose pages can be permuted in one call."""
    return store.backing_layout, store.num_heads, store.backing.device, store.device


def content(stores: list[PageStore], first: int, stop: int) -> Tensor:
    """Pages [first, stop) of all sequences and heads in the backing layout: [L * B, H, n, page elements]."""
    return take_all([store.backing for store in stores], stores[0].rows(first, stop)).flatten(0, 1)


def positions(stores: list[PageStore], first: int, stop: int) -> Tensor:
    """Token at each place of pages [first, stop), which must lie in spans: [L * B, H, n, P], int32."""
    shifts, size = _shifts(stores, first, stop), stores[0].page_size
    return shifts + torch.arange(first * size, stop * size, dtype=torch.int32, device=shifts.device).view(-1, size)


def pages_per_cluster(stores: list[PageStore], first: int, stop: int) -> Tensor:
    """Size in pages of the cluster that begins at each of pages [first, stop), 0 for none: [L * B, H, n], int16."""
    inside = max(first, min(stop, stores[0].sequences.spans.num_pages))
    rows, arrays = stores[0].rows(first, inside), [clustered(store).arrays[1:] for store in stores]
    if not arrays[0]:  # every cluster is one page
        return rows.new_ones((len(stores) * rows.shape[0], rows.shape[1], stop - first), dtype=torch.int16)
    held = take_all([held for (held,) in arrays], rows).flatten(0, 1)
    return torch.nn.functional.pad(held, (0, stop - inside), value=1)  # behind the spans every page is its own cluster


def write_runs(stores: list[PageStore], first: int, stop: int) -> None:
    """Note that pages [first, stop) of all sequences hold tokens in position order and are clusters of one page."""
    rows = stores[0].rows(first, stop)
    shifts = torch.zeros((len(stores), *rows.shape, stores[0].page_size), dtype=torch.int16, device=rows.device)
    for write in _notes(stores, rows, shifts, shifts.new_ones(shifts.shape[:-1])):
        write()


def permute_tokens(
    stores: list[PageStore], first: int, stop: int, order: Tensor, cluster_pages: Tensor, content: Tensor,
    marks: tuple[Callable[[], None], Callable[[], None]],
) -> Tensor:  # fmt: skip
    """Permute the tokens of pages [first, stop) of all sequences, in all layers or, on an error, in none.

    Drops these pages from the frames. Does not update summaries.

    Args:
        order: [L * B, H, tokens], int64, a permutation: place i gets the token at place order[i] of these pages. Sequences
            that share these pages must have equal rows.
        cluster_pages: [L * B, H, n], pages per cluster as in `pages_per_cluster`.
        content: the pages, from `content`.
        marks: functions that record success and failure. They must not allocate.
    Returns:
        the permuted pages, like `content`.
    """
    one = stores[0]
    rows, each = one.rows(first, stop), (len(stores), -1)
    before = _shifts(stores, first, stop), pages_per_cluster(stores, first, stop)
    moved = kernels.move_tokens(content, order, one.page_size, one.backing_layout.token_fields)
    shifts = order - torch.arange(order.shape[2], device=order.device)
    shifts += before[0].flatten(2).gather(2, order)

    def ready(content: Tensor, shifts: Tensor, cluster_pages: Tensor) -> list[Callable[[], None]]:
        notes = _notes(stores, rows, shifts.unflatten(0, each), cluster_pages.unflatten(0, each))
        return [*writers([store.backing for store in stores], rows, content.unflatten(0, each)), *notes]

    undo, redo = ready(content, *before), ready(moved, shifts.unflatten(2, before[0].shape[2:]), cluster_pages)
    for store in stores:
        if store.frames is not None:
            store.frames.forget(first, stop)
    try:  # nothing here allocates
        for write in [*redo, marks[0]]:
            write()
        return moved
    except BaseException:
        for write in [*undo, marks[1]]:
            write()
        raise


def clustered(store: PageStore) -> TokenPermutation:
    """The token permutation of a store, which must have one."""
    assert store.permutation is not None
    return store.permutation


def _shifts(stores: list[PageStore], first: int, stop: int) -> Tensor:
    """Shifts of pages [first, stop), which must lie in spans: [L * B, H, n, P], int16."""
    return take_all([clustered(store).arrays[0] for store in stores], stores[0].rows(first, stop)).flatten(0, 1)


def _notes(stores: list[PageStore], rows: Tensor, shifts: Tensor, cluster_pages: Tensor) -> list[Callable[[], None]]:
    """Writers of shifts [L, B, H, n, P] and pages per cluster [L, B, H, n] to rows [B, H, n] of all stores, as int16."""
    kinds = zip(*(clustered(store).arrays for store in stores), strict=True)
    pairs = zip(kinds, (shifts, cluster_pages), strict=False)  # shifts alone if clusters are single pages
    return [write for held, contents in pairs for write in writers(list(held), rows, contents)]
