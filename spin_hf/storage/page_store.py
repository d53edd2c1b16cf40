"""Pages of one layer, in either tier, and their summaries.

    backing      ChunkedArray of pages, keys then values: in the compute tier if all pages fit, else in the cpu tier, where they
                 may be int8
    summaries    SummaryArrays of the method, one row per page or unit of pages; always in the compute tier
    frames       PageFrames in the model's dtype; only while the backing is in the cpu tier
    permutation  TokenPermutation: which token is at each place; only for methods that cluster; always in the compute tier

Row ids of pages and summaries come from `PageTable.page_rows`, so sharing or copying a segment covers both.
Summaries are computed from decoded keys and values. Results therefore do not depend on which pages are resident.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..config import Tuning
from ..errors import BudgetError, CapacityError
from .chunked_array import ChunkedArray
from .copied import copied
from .page_frames import PageFrames, waves
from .page_layout import Conversion, PageLayout, page_layouts
from .page_table import SEGMENT_PAGES, PageTable, SegmentStore
from .segment_pool import consecutive
from .summary_array import SummaryArray, stored_as
from .tier_budget import TierBudget, chunk_segments, whole_segments
from .token_permutation import TokenPermutation


class PageStore(SegmentStore):
    """Pages and summaries of one layer.

    Args:
        sequences: page table of the batch.
        num_heads: KV heads.
        key_dim, value_dim: head sizes.
        summary_shapes: name -> shape of a page's summary.
        quantized: whether vector summaries are stored as int8.
        budget: caps and sizes.
        tuning: sizes of chunks and pieces.
        dtype: of keys and values.
        device: the compute tier.
        multi_page_clusters: for methods that cluster, whether a cluster may have several pages; None for other methods.
        summary_dtypes: name -> dtype of summaries that are never quantized.
        host_int8: whether pages in the cpu tier are int8.
        pages_per_row: name -> pages that have one row of a summary, 1 if it is missing. They divide the pages of a segment.
    """

    def __init__(
        self, sequences: PageTable, num_heads: int, key_dim: int, value_dim: int, summary_shapes: dict[str, tuple[int, ...]],
        quantized: bool, budget: TierBudget, tuning: Tuning, dtype: torch.dtype, device: torch.device,
        multi_page_clusters: bool | None = None, summary_dtypes: dict[str, torch.dtype] | None = None,
        host_int8: bool = False, pages_per_row: dict[str, int] | None = None,
    ) -> None:  # fmt: skip
        self.sequences = sequences
        self.num_heads, self.key_dim, self.value_dim = num_heads, key_dim, value_dim
        self.page_size = sequences.page_size
        self.budget, self.piece_bytes, self.device, self.dtype = budget, tuning.piece_bytes, device, dtype
        self.layout, self._host_layout = page_layouts(self.page_size, key_dim, value_dim, dtype, host_int8)
        self.length = 0
        """Tokens written to this layer."""
        rows = chunk_segments(num_heads, self.layout.row_bytes, device, tuning) * SEGMENT_PAGES * num_heads
        self.backing = ChunkedArray((self.layout.row_elements,), rows, dtype, device)
        self.summaries = {}
        for name, shape in summary_shapes.items():
            summary_dtype, as_int8 = stored_as(name, dtype, quantized, summary_dtypes or {})
            each = (pages_per_row or {}).get(name, 1)
            self.summaries[name] = SummaryArray(shape, rows // each, summary_dtype, device, as_int8, each)
        self.permutation: TokenPermutation | None = None
        if multi_page_clusters is not None:
            self.permutation = TokenPermutation(sequences, num_heads, rows, device, multi_page_clusters)
        self.frames: PageFrames | None = None
        self.num_segments = self.num_frames = 0
        self.ask_for_more: Callable[[int], bool] | None = None
        """Called with the `gpu_memory` that is needed, in bytes. Returns whether the budget was raised."""
        self.short_of_frames: Callable[[], None] | None = None
        """Called if memory allows fewer page frames than the budget does. Allocation is retried later."""
        self.invalidate: Callable[[int, int], None] | None = None
        """Called with [first, stop) of pages whose storage layout changed. Their summaries must be recomputed."""

    def new_empty(self) -> PageStore:
        """A store of the same sizes, budget and callbacks, without pages. `invalidate` is not set."""
        twin = copied(self, {})
        twin.frames = twin.invalidate = None
        twin.length = twin.num_segments = twin.num_frames = 0
        # The backing of this store may have moved to the cpu tier, in another layout. A new one begins in the compute tier.
        twin.backing = ChunkedArray((self.layout.row_elements,), self.backing.rows_per_chunk, self.dtype, self.device)
        twin.summaries = {name: held.new_empty() for name, held in self.summaries.items()}
        twin.permutation = None if self.permutation is None else self.permutation.new_empty()
        return twin

    @property
    def backing_layout(self) -> PageLayout:
        """Layout of pages in the backing."""
        return self._host_layout if self.backing.converted else self.layout

    @property
    def is_registered(self) -> bool:
        """Whether the pages are in host memory that a GPU reads."""
        return self.backing.is_registered

    # -------------------------------------------------------------------------- `SegmentStore`, which documents these

    def check(self, batch_size: int, num_segments: int, num_pages: int) -> None:
        try:
            self._num_frames(batch_size, num_segments, num_pages)
        except BudgetError as error:
            if self.ask_for_more is None or not self.ask_for_more(error.needed_bytes or 0):
                raise
            self._num_frames(batch_size, num_segments, num_pages)

    def reserve(self, batch_size: int, num_segments: int, num_pages: int, num_ids: int, num_expected: int) -> bool:
        """Allocate rows for segments below `num_ids`, and frames for `num_segments` segments and `num_pages` pages."""
        num_frames = self._num_frames(batch_size, num_segments, num_pages)
        if num_frames is not None:
            if self.frames is None:
                frames = PageFrames(self.num_heads, self.layout.row_elements, self.dtype, self.device)
                self._move_to_cpu()  # first: this frees the memory that the frames need
                self.frames = frames
            held = self.sequences.pages_held() if self.sequences.batch_size == batch_size else None
            self.num_frames = self._take_frames(self.frames, batch_size, num_frames, num_pages, held)
        rows, expected = self.budget.rows(num_ids), self.budget.rows(num_expected)
        grown = [array.grow(rows // pages, expected // pages) for array, pages in self._by_pages()]
        self.num_segments = num_segments
        return num_frames is not None or any(grown)

    def _take_frames(
        self, frames: PageFrames, batch_size: int, wanted: int, num_pages: int, held: Sequence[int] | None
    ) -> int:
        """Allocate up to `wanted` page frames per (sequence, KV head); at least those of a step. Returns the number.

        Free memory may be fragmented, so a size within the budget can still fail.
        """
        while True:
            try:
                frames.resize(batch_size, self.budget.slot_counts(wanted, num_pages, held), whole_segments(num_pages))
                return wanted
            except CapacityError:
                least = self.budget.step_frames(num_pages)
                if wanted <= least:
                    raise
                wanted = max(least, wanted * 3 // 4)
                self.budget = replace(self.budget, most_frames=wanted)  # until the budget is set again
                if self.short_of_frames is not None:
                    self.short_of_frames()

    def shrink(self, num_segments: int) -> None:
        self.num_segments = min(self.num_segments, num_segments)
        for array, pages in self._by_pages():
            array.shrink(self.budget.rows(num_segments) // pages)

    @property
    def capacity(self) -> int:
        return max(array.num_rows * pages for array, pages in self._by_pages()) // self.budget.rows(1)

    @property
    def shares_rows(self) -> bool:
        return any(array.is_shared for array in self._arrays())

    def fork_rows(self, memo: dict[int, Any]) -> None:
        memo.update((id(array), array.fork()) for array in self._arrays())
        if self.frames is not None:
            memo[id(self.frames)] = self.frames.without_pages()

    def __deepcopy__(self, memo: dict[int, Any]) -> PageStore:
        callbacks = "ask_for_more", "short_of_frames", "invalidate"
        return copied(self, memo, "sequences", "backing", "summaries", "permutation", "frames", *callbacks)

    def _num_frames(self, batch_size: int, num_segments: int, num_pages: int) -> int | None:
        return self.budget.num_frames(batch_size, num_segments, num_pages, self.frames is not None)

    def copy_segments(self, pairs: list[tuple[int, int]]) -> None:
        """Copy pages and summaries of (source, destination) segments."""
        for array, pages in self._by_pages():
            array.copy_blocks(pairs, self.budget.rows(1) // pages)

    def truncate(self, length: int) -> None:
        self.length = min(self.length, length)
        if self.frames is not None:
            self.frames.forget_from(-(-length // self.page_size))

    def select(self, rows: list[int]) -> None:
        """Sequence i becomes the old sequence rows[i]. After an error, resident pages may have been dropped."""
        if self.frames is not None:
            had_slots = any(self.frames.slots)
            self.frames.select(rows)
            if had_slots:  # a fork without frames gets them with its first step
                segments = self.num_segments, len(self.sequences.refcounts)
                self.reserve(len(rows), segments[0], self.sequences.num_pages, segments[1], segments[1])

    def forget_resident(self, batch_size: int) -> None:
        """Drop all resident pages and free the frames until the next `reserve`. Safe at any time."""
        if self.frames is not None:
            self.frames.forget_sequences(batch_size)

    def clear(self) -> None:
        self.length = 0
        if self.frames is not None:
            self.frames.forget_all()

    def release(self) -> None:
        """Free all memory; no tokens are held. Pages that moved to the cpu tier will be allocated there again."""
        self.num_segments = self.num_frames = 0
        if self.frames is not None:
            self.frames.forget_sequences(0)
        for array in self._arrays():
            array.release()

    # --------------------------------------------------------------------------------------------- tokens and pages

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Write the tokens of the current step to their pages.

        Args:
            keys, values: [B, H, n, Dk] and [B, H, n, Dv], n = sequences.length - sequences.start.
        """
        start, count = self.sequences.start, keys.shape[2]
        fields = self.backing_layout.encode(keys, values)
        stored = [field.to(self.backing.device) for field in fields]
        for row, segments in enumerate(self.sequences.directory):
            done, (segment, place) = 0, divmod(start, SEGMENT_PAGES * self.page_size)
            for content in self._content(segments[segment:]):
                tokens = min(count - done, len(content) * SEGMENT_PAGES * self.page_size - place)
                states = [field[row, :, done : done + tokens] for field in stored]
                kernels.put_tokens(content, place, states, self.backing_layout.split)
                done, place = done + tokens, 0
        offset = start % self.page_size
        if self.frames is not None and offset:  # only a partly filled page can be resident already
            inside = min(count, self.page_size - offset)
            decoded = self.backing_layout.decode([field[:, :, :inside] for field in fields])
            self.frames.write(start // self.page_size, offset, *decoded)
        self.length = start + count

    def _content(self, segments: list[int]) -> Iterator[Tensor]:
        """Pages of segments, in their order: views [n, H, pages of a segment, row elements] of n consecutive ones each."""
        each = self.budget.rows(1)
        for first, stop in consecutive(segments):
            for rows in self.backing.views(first * each, stop * each):
                yield rows.view(-1, self.num_heads, SEGMENT_PAGES, rows.shape[1])

    def pages(self, count: int) -> tuple[Tensor, Tensor]:
        """Keys [B, H, count * P, Dk] and values [B, H, count * P, Dv] of the first pages, in page order."""
        keys, values = self.backing_layout.take(self.backing.take(self.rows(0, count)))
        return keys.flatten(2, 3), values.flatten(2, 3)

    def rows(self, first: int, stop: int) -> Tensor:
        """Rows [B, H, n] of pages [first, stop) in the backing. `SummaryArray.rows_of` gives those in a summary."""
        return self._rows()[:, :, first:stop]

    def in_order(self, states: Tensor) -> Tensor:
        """Reorder states [B, H, tokens, D] of all tokens from page order to position order."""
        return states if self.permutation is None else self.permutation.in_order(states)

    def by_place(self, mask: Tensor, group: int) -> Tensor:
        """Reorder a mask [B, 1 or heads, Q, tokens] from position order to page order."""
        if self.permutation is None or not self.sequences.spans.num_pages:
            return mask
        return self.permutation.by_place(mask, group)

    def held(self, length: int) -> tuple[Tensor, Tensor]:
        """Copies of keys [B, H, length, Dk] and values [B, H, length, Dv] of the first tokens, in position order."""
        clustered = self.sequences.spans.num_pages
        keys, values = self.pages(max(-(-length // self.page_size), clustered))
        if clustered:  # spans were read whole, as their pages are not in position order
            keys, values = self.in_order(keys), self.in_order(values)
        return keys[:, :, :length], values[:, :, :length]

    def read(self, pages: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Read pages for attention, in waves that fit the page frames. Loads missing pages into frames.

        Args:
            pages: [B, H, n], int64, distinct in each row; -1 for none.
        Yields:
            slice of the n pages, their keys [B, H, m * P, Dk] and values [B, H, m * P, Dv]; undefined at -1.
        """
        rows = self._rows().gather(2, pages.clamp(min=0))
        for wave in waves(self.frames, pages):
            if self.frames is None:
                content = self.backing.take(rows[:, :, wave])
            else:
                content = self.frames.bring_in(pages[:, :, wave], rows[:, :, wave], self._load, self.sequences.step)
            keys, values = self.layout.take(content)
            yield wave, keys.flatten(2, 3), values.flatten(2, 3)

    def summary(self, name: str, pages: Tensor | None = None) -> Tensor:
        """Summaries [B, H, N, ...] of all pages, or [B, H, k, ...] of `pages` [B, H, k]."""
        rows = self._rows()
        rows = rows[:, :, : self.sequences.num_pages] if pages is None else rows.gather(2, pages)
        return self.summaries[name].of_pages(rows)

    @property
    def lacks_frames(self) -> bool:
        """Whether there are fewer page frames than pages."""
        if self.frames is None:
            return False
        pages = self.sequences.pages_held() or [self.sequences.num_pages] * len(self.frames.slots)
        return any(slots < number for slots, number in zip(self.frames.slots, pages, strict=False))

    @property
    def mandatory_frames(self) -> int:
        """Page frames that a step needs, over all sequences and KV heads. The others hold buffer pages."""
        if self.frames is None:
            return 0
        needed = self.budget.step_frames(self.sequences.num_pages)
        return self.num_heads * sum(min(needed, slots) for slots in self.frames.slots)

    @property
    def held_bytes(self) -> int:
        """Bytes allocated in the compute tier. Includes unused rows of chunks on a GPU, where they take memory at once."""
        taken = sum(self._allocated_bytes(array) for array in self._arrays()[self.frames is not None :])
        return taken + (0 if self.frames is None else self.frames.nbytes)

    def _allocated_bytes(self, array: ChunkedArray) -> int:
        return (array.num_rows if self.device.type == "cuda" else array.used_rows) * array.row_bytes

    @property
    def shared_bytes(self) -> int:
        """Of `held_bytes`, what forks use too: it stays allocated while they hold it."""
        if not self.sequences.shared:
            return 0
        arrays = [array for array in self._arrays()[self.frames is not None :] if array.is_shared]
        return sum(self._allocated_bytes(array) for array in arrays)

    def pages_held(self) -> int:
        """Pages of all KV heads that hold tokens. Shared pages count once."""
        pages = {(segment, i) for row in self.sequences.directory for i, segment in enumerate(row)}
        return self.num_heads * sum(min(SEGMENT_PAGES, self.sequences.num_pages - i * SEGMENT_PAGES) for _, i in pages)

    def gpu_bytes(self, num_segments: int) -> int:
        """Bytes of `num_segments` segments in the compute tier: pages or page frames, and summaries."""
        rows = self.budget.rows(num_segments)
        summaries = sum(rows // pages * array.row_bytes for array, pages in self._summary_arrays())
        return summaries + (rows * self.backing.row_bytes if self.frames is None else self.frames.frames.nbytes)

    def cpu_bytes(self, num_segments: int) -> int:
        """Bytes of `num_segments` segments in the cpu tier."""
        return 0 if self.frames is None else self.budget.rows(num_segments) * self.backing.row_bytes

    def metadata(self, num_segments: int) -> dict[str, int]:
        """Bytes of this layer's tables for `num_segments` segments, by name; all in the compute tier."""
        rows = self.budget.rows(num_segments)
        tables = {} if self.frames is None else self.frames.metadata
        clustered = {} if self.permutation is None else self.permutation.metadata(rows)
        return {**tables, **clustered, "address tables": sum(array.table_bytes for array in self._arrays())}

    def check_integrity(self) -> None:
        """Raise CacheStateError if tables disagree or tiers differ."""
        if self.permutation is not None:
            self.permutation.check_integrity()
        if self.frames is not None and self.sequences.batch_size and self.sequences.length:
            num_pages = self.sequences.num_pages
            filled = torch.arange(num_pages * self.page_size, device=self.device) < self.sequences.length
            filled = filled.view(num_pages, self.page_size, 1)
            sides = [filled.expand(-1, -1, dim).flatten(1) for dim in (self.key_dim, self.value_dim)]
            self.frames.check_integrity(num_pages, self._rows(), self._load, torch.cat(sides, 1).unsqueeze(0))

    def _move_to_cpu(self) -> None:
        """Move the backing to the cpu tier and convert it to the host layout. There is no way back."""
        host = self._host_layout
        if host == self.layout or self.backing.converted:
            self.backing.move(torch.device("cpu"))
            return

        def convert(rows: Tensor) -> Tensor:
            return host.join(host.encode(*self.layout.take(rows)))

        for array in self._arrays()[1:]:  # a fork's summaries belong to pages that are not converted
            array.unshare()
        self.sequences.layout_version += 1  # before the move, so that an interruption does not lose it
        if self.invalidate is not None:
            self.invalidate(0, self.length // self.page_size)
        self.backing.move(torch.device("cpu"), Conversion((host.row_elements,), host.row_dtype, convert))

    def _load(self, rows: Tensor) -> Tensor:
        """Load pages from the cpu tier: [*rows.shape, page elements], in the model's dtype."""
        content = self.backing.take(rows)
        return content if self.backing_layout == self.layout else self.layout.join(self.backing_layout.take(content))

    def _arrays(self) -> list[ChunkedArray]:
        return [array for array, _ in self._by_pages()]

    def _by_pages(self) -> list[tuple[ChunkedArray, int]]:
        """All arrays, the backing first, with the pages that have one row."""
        clustered = [] if self.permutation is None else self.permutation.arrays
        return [(self.backing, 1), *self._summary_arrays(), *((array, 1) for array in clustered)]

    def _summary_arrays(self) -> list[tuple[ChunkedArray, int]]:
        return [(array, held.pages_per_row) for held in self.summaries.values() for array in held.arrays]

    def _rows(self) -> Tensor:
        return self.sequences.page_rows(self.num_heads, self.device)
