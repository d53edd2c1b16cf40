"""Memory of stores that forks use too. It counts in every cache that sees it, and no single cache can free it."""

from __future__ import annotations

from ..storage.page_store import PageStore


def own_bytes(stores: list[PageStore]) -> int:
    """Bytes in the compute tier that are shared with no fork."""
    return sum(store.held_bytes - store.shared_bytes for store in stores)


def share_pages(stores: list[PageStore]) -> bool:
    """Whether forks use pages in the compute tier. To move these to the cpu tier would take memory and free none."""
    return any(store.frames is None and store.shared_bytes for store in stores)
