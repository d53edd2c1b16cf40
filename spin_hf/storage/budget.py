"""Bytes to pages: which tier a layer's pages live in, and how many page frames it gets.

    everything fits the cap      pages live in the compute tier, nothing is ever loaded
    otherwise                    pages live in the cpu tier;  cap = summaries + tables + page frames + room to grow
                                 frames = mandatory pages of a step + buffer pages

A cache's cap is divided evenly among its paged layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import BudgetError, CapacityError
from .sequences import SEGMENT_PAGES

AUTO_SHARE_OF_FREE_MEMORY = 0.8
"""Part of the GPU memory that is free at the first step which `gpu_memory="auto"` may use."""

_SLOT_BYTES, _PAGE_TABLE_BYTES = 4 + 8, 4


@dataclass(frozen=True)
class TierBudget:
    """Caps and sizes of one layer.

    Attributes:
        num_layers: paged layers that share the cache's caps.
        page_bytes, summary_bytes: of one page of one KV head.
        gpu_memory, cpu_memory: the cache's caps in bytes; None for none.
        min_frames: page frames per sequence and KV head that a step cannot do without.
    """

    num_layers: int
    num_heads: int
    page_bytes: int
    summary_bytes: int
    gpu_memory: int | None
    cpu_memory: int | None
    min_frames: int

    def num_frames(self, batch_size: int, num_segments: int, num_pages: int) -> int | None:
        """Frames per (sequence, KV head), or None where all pages may live in the compute tier.

        Args:
            num_segments: segments in the pool.
            num_pages: pages per sequence.
        Raises:
            BudgetError: not even the frames of one step fit `gpu_memory`.
            CapacityError: the pages do not fit `cpu_memory`.
        """
        rows = num_segments * SEGMENT_PAGES * self.num_heads
        if (
            self.gpu_memory is None
            or rows * (self.page_bytes + self.summary_bytes) * self.num_layers <= self.gpu_memory
        ):
            return None
        if self.cpu_memory is not None and rows * self.page_bytes * self.num_layers > self.cpu_memory:
            raise CapacityError(
                f"{num_segments * SEGMENT_PAGES} pages of {self.num_heads} KV heads in {self.num_layers} layers need "
                f"{rows * self.page_bytes * self.num_layers} bytes in the cpu tier, cpu_memory is {self.cpu_memory}; "
                "raise cpu_memory or gpu_memory, or shorten the context"
            )
        streams = batch_size * self.num_heads
        table_pages = -(-num_pages // SEGMENT_PAGES) * SEGMENT_PAGES
        frame = streams * (self.page_bytes + _SLOT_BYTES)

        cap = self.gpu_memory // self.num_layers

        def fixed(rows: int, table_pages: int) -> int:
            return rows * self.summary_bytes + streams * table_pages * _PAGE_TABLE_BYTES

        # Frames are copied when their number changes: leave room for what comes before the context is a sixteenth longer.
        frames = (cap - fixed(coarsely(rows), coarsely(table_pages))) // frame
        if frames < self.min_frames:
            frames = (cap - fixed(rows, table_pages)) // frame
        if frames < self.min_frames:
            needed = (fixed(rows, table_pages) + self.min_frames * frame) * self.num_layers
            raise BudgetError(
                f"gpu_memory={self.gpu_memory} bytes cannot hold one step: {batch_size} sequences of {num_pages} pages "
                f"need {needed} bytes (summaries, tables, and {self.min_frames} page frames for sinks, recent window "
                "and one selected page); raise gpu_memory, or lower num_sink_tokens, recent_window or the batch size",
                needed_bytes=needed,
            )
        return min(frames, coarsely(table_pages))


def coarsely(number: int) -> int:
    """`number` or a little more, at most a sixteenth and a segment: the same for most of a growing context's steps."""
    unit = max(SEGMENT_PAGES, 1 << max(0, number.bit_length() - 5))
    return -(-number // unit) * unit


def auto_gpu_memory(device: torch.device) -> int | None:
    """The cap that `gpu_memory="auto"` stands for on a device, in bytes; None (no cap) without a GPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int((free + reusable) * AUTO_SHARE_OF_FREE_MEMORY)
