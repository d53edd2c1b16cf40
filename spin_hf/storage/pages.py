"""The pages of one layer, in whichever tier they are, and the summaries made from them.

    home       ChunkedArray of pages [P * (Dk + Dv)]: keys then values.  compute tier if all fits, else cpu tier
    summaries  SummaryArrays of what the method keeps, one row per page, always in the compute tier
    frames     PageFrames, only while the home is the cpu tier
    regrouped  RegroupedPages, only for methods that regroup: whose tokens they are; always in the compute tier

Row ids come from `Sequences.page_rows` and are the same for pages and summaries, so whatever shares or copies a
segment shares or copies both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import kernels
from .budget import TierBudget
from .chunked import ChunkedArray
from .regrouped import RegroupedPages
from .residency import PageFrames
from .sequences import SEGMENT_PAGES, Sequences
from .summaries import SummaryArray, kept_as

# RAM is committed when it is written, so chunks may be large there; GPU memory and locked RAM are taken at once.
_CPU_CHUNK_BYTES, _GPU_CHUNK_BYTES = 64 << 20, 8 << 20
_MIN_CHUNK_SEGMENTS, _MAX_CHUNK_SEGMENTS = 4, 1024


class PageStore:
    """Pages and summaries of one layer.

    Args:
        sequences: the batch that the pages belong to.
        num_heads: KV heads.
        key_dim, value_dim: head sizes.
        summary_shapes: name -> shape of what the method keeps of one page.
        quantized: whether vectors among it are kept as int8.
        budget: caps and sizes.
        dtype, device: of the keys and values; `device` is the compute tier.
        regroups: whether the method regroups pages, whose positions are then kept.
        summary_dtypes: name -> dtype of those that are kept as they are in any case.
    """

    def __init__(
        self,
        sequences: Sequences,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        summary_shapes: dict[str, tuple[int, ...]],
        quantized: bool,
        budget: TierBudget,
        dtype: torch.dtype,
        device: torch.device,
        regroups: bool = False,
        summary_dtypes: dict[str, torch.dtype] | None = None,
    ) -> None:
        self.sequences = sequences
        self.num_heads, self.key_dim, self.value_dim = num_heads, key_dim, value_dim
        self.page_size = sequences.page_size
        self.budget = budget
        self.device = device
        self.length = 0
        """Tokens written to this layer."""
        elements = self.page_size * (key_dim + value_dim)
        segment_bytes = SEGMENT_PAGES * num_heads * elements * dtype.itemsize
        chunk_bytes = _CPU_CHUNK_BYTES if device.type == "cpu" else _GPU_CHUNK_BYTES
        segments = min(max(chunk_bytes // segment_bytes, _MIN_CHUNK_SEGMENTS), _MAX_CHUNK_SEGMENTS)
        rows = segments * SEGMENT_PAGES * num_heads
        self.home = ChunkedArray((elements,), rows, dtype, device)
        self.summaries = {}
        for name, shape in summary_shapes.items():
            kept, as_int8 = kept_as(name, dtype, quantized, summary_dtypes or {})
            self.summaries[name] = SummaryArray(shape, rows, kept, device, as_int8)
        self.regrouped = RegroupedPages(sequences, num_heads, rows, device) if regroups else None
        self.frames: PageFrames | None = None
        self.num_segments = 0

    # ------------------------------------------------------------------------------- what `Sequences` asks of a store

    def check(self, batch_size: int, num_segments: int, num_pages: int) -> None:
        """Raise BudgetError or CapacityError where `reserve` would exceed a cap."""
        self.budget.num_frames(batch_size, num_segments, num_pages)

    def reserve(self, batch_size: int, num_segments: int, num_pages: int) -> None:
        """Make room for `num_segments` segments and a step over `num_pages` pages."""
        num_frames, frames = self.budget.num_frames(batch_size, num_segments, num_pages), self.frames
        if num_frames is None and frames is not None:
            num_frames = frames.num_slots  # a step that failed moved the pages, which stay where they are
        if num_frames is not None:
            if frames is None:
                self.home.move(torch.device("cpu"))  # first, as that gives back what the frames take
                frames = PageFrames(self.num_heads, self.home.row_shape[0], self.home.dtype, self.device)
            frames.resize(batch_size, num_frames, num_pages)
            self.frames = frames
        for array in self._arrays():
            array.grow(num_segments * SEGMENT_PAGES * self.num_heads)
        self.num_segments = num_segments

    def shrink(self, num_segments: int) -> None:
        """Give back the room for more segments than these. Asks for no memory."""
        if num_segments < self.num_segments:
            self.num_segments = num_segments
        for array in self._arrays():
            array.shrink(num_segments * SEGMENT_PAGES * self.num_heads)

    def copy_segments(self, pairs: list[tuple[int, int]]) -> None:
        """Copy pages and summaries of each (source, destination) segment."""
        if not pairs:
            return
        span = torch.arange(SEGMENT_PAGES * self.num_heads)
        source, destination = (
            (torch.tensor(side).unsqueeze(1) * SEGMENT_PAGES * self.num_heads + span)
            for side in zip(*pairs, strict=True)
        )
        for array in self._arrays():
            array.put(destination, array.take(source))

    def truncate(self, length: int) -> None:
        """Forget tokens from `length` on."""
        self.length = min(self.length, length)
        if self.frames is not None:
            self.frames.forget_from(-(-length // self.page_size))

    def select(self, rows: list[int]) -> None:
        """Sequence i becomes what sequence rows[i] was. Where that fails, pages may have to be loaded again."""
        if self.frames is not None:
            if len(rows) == self.sequences.batch_size:
                self.frames.select(rows)
            self.reserve(len(rows), self.num_segments, self.sequences.num_pages)  # another batch, another share

    def clear(self) -> None:
        """Forget all; memory is kept."""
        self.length = 0
        if self.frames is not None:
            self.frames.forget_all()

    # --------------------------------------------------------------------------------------------- tokens and pages

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Write the tokens of the present step to their pages.

        Args:
            keys, values: [B, H, n, Dk] and [B, H, n, Dv], n = sequences.length - sequences.start.
        """
        batch_size, _, count, _ = keys.shape
        start = self.sequences.start
        positions = torch.arange(start, start + count, device=self.device)
        pages = torch.div(positions, self.page_size, rounding_mode="floor")
        rows = self._rows()[:, :, pages].reshape(-1).to(self.home.device)
        offsets = (positions % self.page_size).expand(batch_size, self.num_heads, -1).reshape(-1).to(self.home.device)
        flat_keys = keys.reshape(-1, self.key_dim).to(self.home.device)
        flat_values = values.reshape(-1, self.value_dim).to(self.home.device)
        kernels.put_tokens(self.home.chunks, rows, offsets, flat_keys, flat_values)
        offset = start % self.page_size
        if self.frames is not None and offset:  # only a partly filled page can be resident already
            inside = min(count, self.page_size - offset)
            self.frames.write(start // self.page_size, offset, keys[:, :, :inside], values[:, :, :inside])
        self.length = start + count

    def pages(self, first: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pages [first, stop) of all sequences and heads, straight from their home: for indexing and hand-over.

        Returns:
            keys [B, H, n, P, Dk], values [B, H, n, P, Dv], rows [B, H, n].
        """
        rows = self._rows()[:, :, first:stop]
        return *kernels.split_pages(self.home.take(rows), self.page_size, self.key_dim), rows

    def rearrange(self, first: int, stop: int, order: Tensor, partition_pages: Tensor) -> None:
        """Let the tokens of pages [first, stop) of all sequences trade places, or none. Summaries are not brought up to that.

        Args:
            order: [B, H, tokens], int64, a permutation: place i gets the token at place order[i] of these pages; the same
                for sequences that share these pages.
            partition_pages: [B, H, n], as `RegroupedPages` keeps it.
        """
        regrouped, rows = self.regrouped, self._rows()[:, :, first:stop]
        assert regrouped is not None
        content, positions = self.home.take(rows), regrouped.positions(first, stop)
        partitions = regrouped.partition_pages(first, stop)

        def writers(content: Tensor, positions: Tensor, partition_pages: Tensor) -> list[Callable[[], None]]:
            return [self.home.writer(rows, content), *regrouped.writers(rows, positions, partition_pages)]

        undo = writers(content, positions, partitions)
        keys, values = kernels.split_pages(content, self.page_size, self.key_dim)
        keys, values, positions = (_take_tokens(part, order) for part in (keys, values, positions.unsqueeze(-1)))
        redo = writers(torch.cat([keys.flatten(3), values.flatten(3)], 3), positions.squeeze(-1), partition_pages)
        if self.frames is not None:
            self.frames.forget(first, stop)
        try:  # nothing here asks for memory
            for write in redo:
                write()
        except BaseException:
            for write in undo:
                write()
            raise

    def in_order(self, states: Tensor) -> Tensor:
        """States [B, H, tokens, D] of all tokens, as they stand in the pages, in the order of their positions."""
        return states if self.regrouped is None else self.regrouped.in_order(states)

    def by_place(self, mask: Tensor, group: int) -> Tensor:
        """A mask [B, 1 or heads, Q, tokens] over positions, as one over the tokens as they stand in the pages."""
        if self.regrouped is None or not self.sequences.stretches.num_pages:
            return mask
        return self.regrouped.by_place(mask, group)

    def read(self, pages: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Retrieve pages for attention, in as many waves as the page frames make necessary (one, if all fit).

        Args:
            pages: [B, H, n], int64, distinct in each row; -1 for none.
        Yields:
            which of the n pages, their keys [B, H, m * P, Dk] and values [B, H, m * P, Dv]; undefined at -1.
        """
        rows = self._rows().gather(2, pages.clamp(min=0))
        width = self.frames.num_slots if self.frames is not None else max(1, pages.shape[2])
        for first in range(0, pages.shape[2], width):
            part = slice(first, first + width)
            if self.frames is None:
                content = self.home.take(rows[:, :, part])
            else:
                content = self.frames.bring_in(pages[:, :, part], rows[:, :, part], self.home, self.sequences.step)
            keys, values = kernels.split_pages(content, self.page_size, self.key_dim)
            yield part, keys.flatten(2, 3), values.flatten(2, 3)

    def summary(self, name: str, pages: Tensor | None = None) -> Tensor:
        """The method's vectors [B, H, N, ...] of all pages of all sequences, or of pages [B, H, k] only."""
        rows = self._rows()
        rows = rows[:, :, : self.sequences.num_pages] if pages is None else rows.gather(2, pages)
        return self.summaries[name].take(rows)

    def pages_held(self) -> int:
        """Pages of all KV heads that hold tokens; pages that sequences share count once."""
        pages = {(segment, i) for row in self.sequences.directory for i, segment in enumerate(row)}
        return self.num_heads * sum(min(SEGMENT_PAGES, self.sequences.num_pages - i * SEGMENT_PAGES) for _, i in pages)

    def gpu_bytes(self, num_segments: int) -> int:
        """Bytes that `num_segments` segments take in the compute tier: pages or page frames, and summaries."""
        rows = num_segments * SEGMENT_PAGES * self.num_heads
        summaries = rows * sum(array.row_bytes for array in self._summary_arrays())
        return summaries + (rows * self.home.row_bytes if self.frames is None else self.frames.frames.nbytes)

    def cpu_bytes(self, num_segments: int) -> int:
        """Bytes that `num_segments` segments take in the cpu tier."""
        return 0 if self.frames is None else num_segments * SEGMENT_PAGES * self.num_heads * self.home.row_bytes

    def metadata(self, num_segments: int) -> dict[str, int]:
        """Bytes of this layer's tables while `num_segments` segments are held, by name; all in the compute tier."""
        rows = num_segments * SEGMENT_PAGES * self.num_heads
        tables = {} if self.frames is None else self.frames.metadata
        regrouped = {} if self.regrouped is None else self.regrouped.metadata(rows)
        return {**tables, **regrouped, "address tables": sum(array.table_bytes for array in self._arrays())}

    def check_integrity(self) -> None:
        """Raise CacheStateError where tables disagree or tiers differ."""
        if self.regrouped is not None:
            self.regrouped.check_integrity()
        if self.frames is not None and self.sequences.batch_size and self.sequences.length:
            num_pages = self.sequences.num_pages
            filled = torch.arange(num_pages * self.page_size, device=self.device) < self.sequences.length
            filled = filled.view(num_pages, self.page_size, 1)
            sides = [filled.expand(-1, -1, dim).flatten(1) for dim in (self.key_dim, self.value_dim)]
            self.frames.check_integrity(num_pages, self._rows(), self.home, torch.cat(sides, 1).unsqueeze(0))

    def _arrays(self) -> list[ChunkedArray]:
        regrouped = [] if self.regrouped is None else self.regrouped.arrays
        return [self.home, *self._summary_arrays(), *regrouped]

    def _summary_arrays(self) -> list[ChunkedArray]:
        return [array for summary in self.summaries.values() for array in summary.arrays]

    def _rows(self) -> Tensor:
        return self.sequences.page_rows(self.num_heads, self.device)


def _take_tokens(states: Tensor, order: Tensor) -> Tensor:
    """Tokens `order` [B, H, tokens] of pages [B, H, n, P, D], as pages."""
    index = order.unsqueeze(-1).expand(-1, -1, -1, states.shape[-1])
    return states.flatten(2, 3).gather(2, index).unflatten(2, states.shape[2:4])
