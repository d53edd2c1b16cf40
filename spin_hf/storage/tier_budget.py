"""Tier budget of a layer: in which tier its pages live, and how many page frames it gets.

    all pages fit the cap        pages live in the compute tier, nothing is ever loaded
    otherwise                    pages live in the cpu tier;  cap = summaries + tables + page frames + room to grow
                                 (tables include what the method fits to sequences)
                                 frames = mandatory pages of a step + buffer pages

The cap of a device is divided evenly among the paged layers on it, that of host memory among all layers. With
`gpu_memory="auto"` the cap changes (`memory/gpu_memory.py`), and with it the budgets of the layers. Pages that moved to the cpu
tier stay there, as frames hold copies only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from ..config import Tuning
from ..errors import BudgetError, CapacityError
from .page_table import SEGMENT_PAGES, segments_of

PAGE_SLOT_BYTES, SLOT_PAGE_BYTES, SLOT_STEP_BYTES = 4, 4, 8
"""Bytes per entry of the tables in `storage/page_frames.py`: the first per page, the others per page frame."""


@dataclass(frozen=True)
class TierBudget:
    """Caps and sizes of one layer.

    Attributes:
        num_layers: paged layers that share `gpu_memory`: those on the layer's device.
        page_bytes, summary_bytes: of one page of one KV head in the compute tier, in the backing or in a page frame.
        host_page_bytes: of one page of one KV head in the cpu tier.
        gpu_memory, cpu_memory: caps in bytes, of the cache on this device and in host memory; None for none.
        min_frames: fewest page frames per (sequence, KV head) with which a step can run.
        clustering_bytes: of one page of one KV head, for its token permutation; 0 for methods that do not cluster.
        sequence_bytes: of one sequence and KV head, for tensors that the method fits to sequences; 0 for none.
        selected: pages per KV head that a step selects: a number, or a fraction of all pages.
        chunk_segments: allocation granularity in the compute tier, in segments; 1 if memory is committed on first write.
        most_frames: upper limit of page frames per (sequence, KV head); None for none.
        host_layers: paged layers that share `cpu_memory`: those on all devices; 0 for `num_layers`.
    """

    num_layers: int
    num_heads: int
    page_bytes: int
    host_page_bytes: int
    summary_bytes: int
    gpu_memory: int | None
    cpu_memory: int | None
    min_frames: int
    clustering_bytes: int = 0
    sequence_bytes: int = 0
    selected: int | float = 0
    chunk_segments: int = 1
    most_frames: int | None = None
    host_layers: int = 0

    def num_frames(self, batch_size: int, num_segments: int, num_pages: int, paged: bool = False) -> int | None:
        """Frames per (sequence, KV head), or None if all pages may live in the compute tier.

        Args:
            num_segments: segments in the pool.
            num_pages: pages per sequence.
            paged: whether the pages already live in the cpu tier, so that frames are needed.
        Raises:
            BudgetError: the frames of one step do not fit `gpu_memory`.
            CapacityError: the pages do not fit `cpu_memory`.
        """
        if self.gpu_memory is None:
            return coarsely(whole_segments(num_pages)) if paged else None
        if not paged and self.resident_bytes(batch_size, num_segments) <= self.gpu_memory:
            return None
        in_host = self.host_bytes(num_segments)
        if self.cpu_memory is not None and in_host > self.cpu_memory:
            fitting = self.fitting_batch_size(batch_size, num_segments, num_pages)
            raise CapacityError(
                f"{num_segments * SEGMENT_PAGES} pages of {self.num_heads} KV heads in {self._host_layers} layers need "
                f"{in_host} bytes in the cpu tier, cpu_memory is {self.cpu_memory}; "
                f"raise cpu_memory or gpu_memory, {_smaller(fitting)}",
                needed_bytes=in_host,
                available_bytes=self.cpu_memory,
                fitting_batch_size=fitting,
            )
        cap, rows = self.gpu_memory // self.num_layers, self._taken(self.rows(num_segments))
        streams, table_pages = batch_size * self.num_heads, whole_segments(num_pages)
        frame = streams * self._frame_bytes
        # A change of the frame count copies all frames. So leave room for a context that is one sixteenth longer.
        frames = (cap - self._fixed_bytes(self._taken(coarsely(rows)), streams, coarsely(table_pages))) // frame
        if frames < self.min_frames:  # not more: a lower cap must never give more frames
            frames = min(self.min_frames, (cap - self._fixed_bytes(rows, streams, table_pages)) // frame)
        if frames < self.min_frames:
            needed = self.smallest_gpu_memory(batch_size, num_segments, num_pages)
            fitting = self.fitting_batch_size(batch_size, num_segments, num_pages)
            large = 8 * self.summary_bytes > self.page_bytes
            raise BudgetError(
                f"gpu_memory={self.gpu_memory} bytes cannot hold one step: {batch_size} sequences of {num_pages} pages "
                f"need {needed} bytes (summaries, tables, and {self.min_frames} page frames for sinks, recent window "
                "and one selected page, or all pages if that is less); raise gpu_memory, lower num_sink_tokens or "
                f"recent_window, {_SMALLER_SUMMARIES if large else ''}{_smaller(fitting)}",
                needed_bytes=needed,
                available_bytes=self.gpu_memory,
                fitting_batch_size=fitting,
            )
        if self.most_frames is not None:
            frames = min(frames, max(self.most_frames, self.step_frames(num_pages)))
        return min(frames, coarsely(table_pages))

    def step_frames(self, num_pages: int) -> int:
        """Mandatory frames: per (sequence, KV head), all pages of one step over sequences of `num_pages` pages."""
        selected = self.selected if isinstance(self.selected, int) else math.ceil(self.selected * num_pages)
        return max(self.min_frames, min(self.min_frames - 1 + selected, num_pages))

    def slot_counts(self, frames: int, num_pages: int, held: Sequence[int] | None) -> tuple[int, ...] | int:
        """Slots per KV head of each sequence, in proportion to its pages. On average at most `frames`.

        A sequence gets at least min(frames, mandatory frames), and beyond that at most its pages, rounded up.

        Args:
            held: pages of each sequence that hold real tokens; None without padding.
        """
        if held is None or frames >= num_pages:
            return frames
        least = min(frames, self.step_frames(num_pages))
        # Coarse, so that slot counts seldom change.
        pages = [max(least, min(coarsely(number), num_pages)) for number in held]
        left, wanted = (frames - least) * len(pages), sum(pages) - least * len(pages)
        if left >= wanted:
            return tuple(pages)
        return tuple(least + left * (number - least) // wanted for number in pages)

    def bytes_with(self, frames: int, batch_size: int, num_segments: int, num_pages: int) -> int:
        """Smallest `gpu_memory` in bytes that gives `frames` frames; other arguments as for `num_frames`."""
        streams = batch_size * self.num_heads
        fixed = self._fixed_bytes(self._taken(self.rows(num_segments)), streams, whole_segments(num_pages))
        return (fixed + frames * streams * self._frame_bytes) * self.num_layers

    def rows(self, num_segments: int) -> int:
        """Rows, i.e. pages of all KV heads, in `num_segments` segments."""
        return num_segments * SEGMENT_PAGES * self.num_heads

    def resident_bytes(self, batch_size: int, num_segments: int) -> int:
        """Bytes of the device's layers in the compute tier, with all pages there."""
        pages = self._taken(self.rows(num_segments)) * (self.page_bytes + self._row_bytes)
        return (pages + batch_size * self.num_heads * self.sequence_bytes) * self.num_layers

    def host_bytes(self, num_segments: int) -> int:
        """Bytes of all layers in the cpu tier, with all pages there."""
        return self.rows(num_segments) * self.host_page_bytes * self._host_layers

    def smallest_gpu_memory(self, batch_size: int, num_segments: int, num_pages: int) -> int:
        """Smallest `gpu_memory` in bytes that `num_frames` accepts; same arguments."""
        resident = self.resident_bytes(batch_size, num_segments)
        if self.cpu_memory is not None and self.host_bytes(num_segments) > self.cpu_memory:
            return resident
        return min(resident, self.bytes_with(self.min_frames, batch_size, num_segments, num_pages))

    def fits(self, batch_size: int, num_segments: int, num_pages: int) -> bool:
        """Whether `num_frames` accepts these arguments."""
        smallest = self.smallest_gpu_memory(batch_size, num_segments, num_pages)
        return self.gpu_memory is None or smallest <= self.gpu_memory

    def fitting_batch_size(self, batch_size: int, num_segments: int, num_pages: int) -> int:
        """Largest batch below `batch_size` that fits with at most `num_segments` segments; 0 if none does."""
        each = segments_of(num_pages)

        def fits(smaller: int) -> bool:
            return self.fits(smaller, min(num_segments, smaller * each), num_pages)

        return largest(fits, batch_size - 1)

    @property
    def _host_layers(self) -> int:
        return self.host_layers or self.num_layers

    @property
    def _row_bytes(self) -> int:
        return self.summary_bytes + self.clustering_bytes

    @property
    def _frame_bytes(self) -> int:
        return self.page_bytes + SLOT_PAGE_BYTES + SLOT_STEP_BYTES

    def _taken(self, rows: int) -> int:
        """`rows`, rounded up to whole chunks."""
        chunk = self.rows(self.chunk_segments)
        return -(-rows // chunk) * chunk

    def _fixed_bytes(self, rows: int, streams: int, table_pages: int) -> int:
        """Bytes of one layer that do not depend on the number of frames."""
        return rows * self._row_bytes + streams * (table_pages * PAGE_SLOT_BYTES + self.sequence_bytes)


def check_all(budgets: Iterable[TierBudget], batch_size: int, num_segments: int, num_pages: int) -> None:
    """Call `TierBudget.num_frames` for all layers, largest need first, and raise its first error."""
    room = batch_size, num_segments, num_pages
    for budget in sorted(set(budgets), key=lambda budget: budget.smallest_gpu_memory(*room), reverse=True):
        budget.num_frames(*room)


def chunk_segments(num_heads: int, page_bytes: int, device: torch.device, tuning: Tuning) -> int:
    """Segments per chunk of a layer's arrays on a device."""
    chunk_bytes = tuning.cpu_chunk_bytes if device.type == "cpu" else tuning.gpu_chunk_bytes
    segments = chunk_bytes // (SEGMENT_PAGES * num_heads * page_bytes)
    return min(max(segments, tuning.min_chunk_segments), tuning.max_chunk_segments)


def whole_segments(num_pages: int) -> int:
    """`num_pages`, rounded up to whole segments."""
    return segments_of(num_pages) * SEGMENT_PAGES


def largest(fits: Callable[[int], bool], most: int) -> int:
    """Largest number up to `most` that fits, by bisection; 0 if none does. `fits` must be monotonic."""
    low, high = 0, max(0, most) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def coarsely(number: int) -> int:
    """`number` rounded up, by at most a sixteenth and a segment, so that it seldom changes as a context grows."""
    unit = max(SEGMENT_PAGES, 1 << max(0, number.bit_length() - 5))
    return -(-number // unit) * unit


_SMALLER_SUMMARIES = 'take a method with smaller summaries, such as "shadowkv", '


def _smaller(fitting_batch_size: int) -> str:
    if not fitting_batch_size:
        return "or shorten the context: not even one sequence of that length fits"
    return f"shorten the context, or use a batch of {fitting_batch_size}, which fits"
