"""What the page table needs of a layer's storage: rows for segments, which it reserves, copies and frees."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol


class Room(NamedTuple):
    """What is reserved in a store; the arguments of `SegmentStore.reserve`.

    Attributes:
        batch_size: sequences.
        num_segments: segments in the pool, expected ones included.
        num_pages: pages per sequence, expected ones included.
        num_ids: ids of segments that get rows now are below this.
        num_expected: likewise of segments that follow soon.
    """

    batch_size: int
    num_segments: int
    num_pages: int
    num_ids: int
    num_expected: int


class SegmentStore(Protocol):
    """Storage of a layer, as the page table drives it."""

    length: int

    def check(self, batch_size: int, num_segments: int, num_pages: int) -> None:
        """Raise BudgetError or CapacityError if `reserve` would exceed a cap. Changes nothing."""

    def reserve(self, batch_size: int, num_segments: int, num_pages: int, num_ids: int, num_expected: int) -> bool:
        """Allocate for a batch of this size, and rows for segments below `num_ids`.

        Segments below `num_expected` follow soon: their rows may be allocated too, or prepared in the background.

        Returns:
            Whether memory may have been allocated or moved. Most segments lie in chunks that are allocated.
        """

    def shrink(self, num_segments: int) -> None:
        """Free the rows of segments from `num_segments` on. Allocates nothing."""

    def copy_segments(self, pairs: list[tuple[int, int]]) -> None:
        """Copy the rows of (source, destination) segments."""

    def truncate(self, length: int) -> None:
        """Drop tokens from `length` on."""

    def select(self, rows: list[int]) -> None:
        """Sequence i becomes the old sequence rows[i]."""

    def forget_resident(self, batch_size: int) -> None:
        """Drop all resident pages. They are loaded again on their next use."""

    def clear(self) -> None:
        """Drop all tokens. Memory stays allocated."""

    def release(self) -> None:
        """Free all memory. No tokens are held."""

    @property
    def capacity(self) -> int:
        """Segments that have rows in the allocated chunks. Their ids are below this number."""

    @property
    def shares_rows(self) -> bool:
        """Whether a fork may see some of the rows."""

    def fork_rows(self, memo: dict[int, Any]) -> None:
        """Add to `memo`, for `deepcopy` of this store: arrays that share their rows, and frames without pages."""
