"""Tokens of several layers' pages that trade places at once: layers that are alike, as all of them have the same rows.

    content [L, B, H, n, page elements]  --order-->  moved  -->  homes, shifts, partitions;  frames forget these pages

Launches are what such work costs beside the bytes, so a call serves as many layers as temporary memory allows.
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
    """Equal for stores whose pages can be permuted in one call."""
    return store.backing_layout, store.num_heads, store.backing.device, store.device


def content(stores: list[PageStore], first: int, stop: int) -> Tensor:
    """Pages [first, stop) of all sequences and heads, as they are kept: [L * B, H, n, page elements]."""
    return take_all([store.backing for store in stores], stores[0].rows(first, stop)).flatten(0, 1)


def positions(stores: list[PageStore], first: int, stop: int) -> Tensor:
    """Tokens of pages [first, stop), which lie in spans: [L * B, H, n, P], int32."""
    shifts, size = _shifts(stores, first, stop), stores[0].page_size
    return shifts + torch.arange(first * size, stop * size, dtype=torch.int32, device=shifts.device).view(-1, size)


def pages_per_cluster(stores: list[PageStore], first: int, stop: int) -> Tensor:
    """Pages of the partition that each of pages [first, stop) begins, 0 for none: [L * B, H, n], int16."""
    inside = max(first, min(stop, stores[0].sequences.spans.num_pages))
    rows, arrays = stores[0].rows(first, inside), [clustered(store).arrays[1:] for store in stores]
    if not arrays[0]:  # they are pages
        return torch.ones(
            (len(stores) * rows.shape[0], rows.shape[1], stop - first), dtype=torch.int16, device=rows.device
        )
    held = take_all([held for (held,) in arrays], rows).flatten(0, 1)
    return torch.nn.functional.pad(held, (0, stop - inside), value=1)  # behind the spans each page is one by itself


def write_runs(stores: list[PageStore], first: int, stop: int) -> None:
    """Pages [first, stop) of all sequences are runs of positions, and partitions by themselves."""
    rows = stores[0].rows(first, stop)
    shifts = torch.zeros((len(stores), *rows.shape, stores[0].page_size), dtype=torch.int16, device=rows.device)
    for write in _notes(stores, rows, shifts, shifts.new_ones(shifts.shape[:-1])):
        write()


def permute_tokens(
    stores: list[PageStore],
    first: int,
    stop: int,
    order: Tensor,
    partitions: Tensor,
    content: Tensor,
    marks: tuple[Callable[[], None], Callable[[], None]],
) -> Tensor:
    """Let the tokens of pages [first, stop) of all sequences trade places, in all layers or, where that fails, in none.

    Summaries are not brought up to that.

    Args:
        order: [L * B, H, tokens], int64, a permutation: place i gets the token at place order[i] of these pages; the same
            for sequences that share these pages.
        partitions: [L * B, H, n], as `TokenPermutation` keeps it.
        content: the pages, as `content` gives them.
        marks: note that it is done, and that it is not; neither asks for memory.
    Returns:
        the pages in their new order.
    """
    one = stores[0]
    rows, each = one.rows(first, stop), (len(stores), -1)
    before = _shifts(stores, first, stop), pages_per_cluster(stores, first, stop)
    moved = kernels.move_tokens(content, order, one.page_size, one.backing_layout.token_parts)
    shifts = order - torch.arange(order.shape[2], device=order.device)
    shifts += before[0].flatten(2).gather(2, order)

    def ready(content: Tensor, shifts: Tensor, partitions: Tensor) -> list[Callable[[], None]]:
        notes = _notes(stores, rows, shifts.unflatten(0, each), partitions.unflatten(0, each))
        return [*writers([store.backing for store in stores], rows, content.unflatten(0, each)), *notes]

    undo, redo = ready(content, *before), ready(moved, shifts.unflatten(2, before[0].shape[2:]), partitions)
    for store in stores:
        if store.frames is not None:
            store.frames.forget(first, stop)
    try:  # nothing here asks for memory
        for write in [*redo, marks[0]]:
            write()
        return moved
    except BaseException:
        for write in [*undo, marks[1]]:
            write()
        raise


def clustered(store: PageStore) -> TokenPermutation:
    """Whose tokens a store's pages hold."""
    assert store.permutation is not None
    return store.permutation


def _shifts(stores: list[PageStore], first: int, stop: int) -> Tensor:
    """How far the tokens of pages [first, stop) have come, which lie in spans: [L * B, H, n, P], int16."""
    return take_all([clustered(store).arrays[0] for store in stores], stores[0].rows(first, stop)).flatten(0, 1)


def _notes(stores: list[PageStore], rows: Tensor, shifts: Tensor, partitions: Tensor) -> list[Callable[[], None]]:
    """What notes shifts [L, B, H, n, P] and partitions [L, B, H, n] in rows [B, H, n] of all stores, as int16."""
    kinds = zip(*(clustered(store).arrays for store in stores), strict=True)  # without partitions, shifts alone
    pairs = zip(kinds, (shifts, partitions), strict=False)
    return [write for held, noted in pairs for write in writers(list(held), rows, noted)]
