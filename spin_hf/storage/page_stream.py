"""Reads the earlier tokens of a layer in pieces, for attention to all of them.

    pages in the compute tier    gathered piece by piece, in one launch; or read where they are (`resident_pages`)
    pages in host memory         copied by the copy engine on a second stream, into one of two buffers in turn

        copy stream      | load 0 | load 1 |        | load 2 |        | ...
        compute stream            | use 0           | use 1           | use 2 ...

A piece is a range of whole segments with at most `piece_bytes` of keys and values, but at least one segment. Consecutive
segments in host memory are one copy. Page frames are neither read nor changed, as each page is read only once.

Memory for `PIECE_BUFFERS` pieces is set aside. A piece of pages in the compute tier may be as large as all of them, if nobody
copies it: every piece costs launches, which take longer than the work of a few queries.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import kernels
from ..kernels import ResidentPages
from .page_store import PageStore
from .page_table import SEGMENT_PAGES, segments_of

PIECE_BUFFERS = 4
"""Buffers of `piece_bytes` in use at once: two for loads, one for the current piece, one for a contiguous copy of it."""
_MOST_BUFFERS = 1.25 * PIECE_BUFFERS
"""Most for all tokens at once. A few queries need less memory for other states than a chunk of a prompt, by more than that.
With 128 MiB it is 160K tokens of eight KV heads of 128 numbers, in 16 bits."""


class TokenStream:
    """Tokens [0, stop) of all sequences, in page order, once. A context manager; loads from host memory begin when it is made.

    Iterating yields the position of a piece's first token, its keys [B, H, m, Dk] and values [B, H, m, Dv]. A piece is valid
    until the next one is requested. The caller drops it before that, so that its memory is free.

    Args:
        store: the layer's pages.
        large: whether a piece in the compute tier may take `PIECE_BUFFERS` times `piece_bytes`.
    """

    def __init__(self, store: PageStore, stop: int, large: bool = False) -> None:
        num_pages = -(-stop // store.page_size)
        self.store, self.stop = store, stop
        most = store.piece_bytes * (PIECE_BUFFERS if large and not store.is_registered else 1)
        self.ranges = [(first, min(last, num_pages)) for first, last in _ranges(store, num_pages, most)]
        self.loads = _HostLoads(store, self.ranges) if store.is_registered and self.ranges else None

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, *_: object) -> None:
        if self.loads is not None:
            self.loads.close()

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        store = self.store
        for index, (first, last) in enumerate(self.ranges):
            loads, start = self.loads, first * store.page_size
            num_tokens = min(last * store.page_size, self.stop) - start
            if loads is None:
                yield start, *gather(store, first, num_tokens)
            else:
                yield start, *_tokens_of(store, loads.wait_for(index), num_tokens)
                loads.release(index)


def resident_pages(store: PageStore, first: int, stop: int) -> ResidentPages | None:
    """Pages [first, stop) where they are; None if they are not in the compute tier, or no kernels serve it.

    Args:
        first: the first page of a segment.
    """
    if store.frames is not None or store.backing.is_registered or kernels.launchers(store.device) is None:
        return None
    return ResidentPages(
        store.backing.address_table, store.rows(first, stop), store.backing.rows_per_chunk, SEGMENT_PAGES,
        store.page_size, store.key_dim, store.value_dim, store.dtype,
    )  # fmt: skip


def gather(store: PageStore, first: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Keys [B, H, num_tokens, Dk] and values [B, H, num_tokens, Dv] from page `first` on, the first page of a segment."""
    stop = first + -(-num_tokens // store.page_size)
    pages = resident_pages(store, first, stop)
    if pages is not None:
        return kernels.gather_tokens(pages, num_tokens)
    return _tokens_of(store, store.backing.take(store.rows(first, stop)), num_tokens)


def gather_all(store: PageStore, num_tokens: int) -> tuple[Tensor, Tensor] | None:
    """`gather` from the first page on; None if that is much more than all buffers, or pages are in host memory.

    Chunks of a prompt that goes on take no more than the buffers.
    """
    num_segments = segments_of(-(-num_tokens // store.page_size))
    most = PIECE_BUFFERS if store.sequences.expected_tokens > num_tokens else _MOST_BUFFERS
    if store.frames is not None or num_segments * _segment_bytes(store) > most * store.piece_bytes:
        return None
    return gather(store, 0, num_tokens)


def _tokens_of(store: PageStore, content: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the first tokens of pages [B, H, ..., page elements], in the layout of the backing."""
    keys, values = (states.flatten(2, -2)[:, :, :num_tokens] for states in store.backing_layout.take(content))
    return keys, values


def _ranges(store: PageStore, num_pages: int, most_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of pages, in whole segments of at most `most_bytes`.

    The first one of a load is shorter, as only attention of the new tokens hides it.
    """
    most = max(1, most_bytes // _segment_bytes(store))
    most = 1 << (most.bit_length() - 1)  # few different sizes: cuDNN prepares each one
    first, width = 0, max(1, most // 4) if store.is_registered else most
    while first < num_pages:
        yield first, first + width * SEGMENT_PAGES
        first, width = first + width * SEGMENT_PAGES, most


def _segment_bytes(store: PageStore) -> int:
    return SEGMENT_PAGES * store.num_heads * store.layout.row_bytes * max(1, store.sequences.batch_size)


class _HostLoads:
    """Loads of pieces from registered host memory into two buffers.

    Args:
        store: the layer's pages.
        ranges: pages [first, last) of each piece.
    """

    def __init__(self, store: PageStore, ranges: list[tuple[int, int]]) -> None:
        self.store, self.ranges = store, ranges
        backing, batch_size = store.backing, store.sequences.batch_size
        widest = max(segments_of(last - first) for first, last in ranges)
        shape = (batch_size, widest, store.num_heads * SEGMENT_PAGES, *backing.row_shape)
        self.buffers = [torch.empty(shape, dtype=backing.dtype, device=store.device) for _ in ranges[:2]]
        self.compute = torch.cuda.current_stream(store.device)
        self.copies = _copy_stream(store.device)
        self.copies.wait_stream(self.compute)  # the buffers are free, and the pages written, when the stream gets here
        self.loaded = [torch.cuda.Event() for _ in self.buffers]
        self.used = [torch.cuda.Event() for _ in self.buffers]
        for index in range(len(self.buffers)):
            self._load(index)

    def wait_for(self, index: int) -> Tensor:
        """Make the compute stream wait for piece `index`. Returns a view of its segments, [B, H, S, pages, page elements]."""
        self.compute.wait_event(self.loaded[index % 2])
        first, last = self.ranges[index]
        segments = self.buffers[index % 2][:, : segments_of(last - first)]
        return segments.unflatten(2, (self.store.num_heads, SEGMENT_PAGES)).transpose(1, 2)

    def release(self, index: int) -> None:
        """Load the next but one piece once the work on piece `index` that is queued so far has ended."""
        self.used[index % 2].record(self.compute)
        if index + 2 < len(self.ranges):
            self.copies.wait_event(self.used[index % 2])
            self._load(index + 2)

    def close(self) -> None:
        """Make the compute stream wait for all loads, so that the buffers can be freed."""
        self.compute.wait_stream(self.copies)

    def _load(self, index: int) -> None:
        first, last = self.ranges[index]
        start, stop = first // SEGMENT_PAGES, segments_of(last)
        rows = SEGMENT_PAGES * self.store.num_heads
        with torch.cuda.stream(self.copies):
            for row, directory in enumerate(self.store.sequences.directory):
                target = self.buffers[index % 2][row].flatten(0, 1)
                self.store.backing.copy_runs([segment * rows for segment in directory[start:stop]], rows, target)
            self.loaded[index % 2].record(self.copies)


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
