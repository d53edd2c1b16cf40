"""The checksum of a piece of a tensor: as fast as its memory is read, so that a verified load is nearly as fast as any other.

    piece    rows of 64 words of 64 bits, 512 bytes: a sector      sums, modulo 2^64
             w00 w01 ... w0n                                       -> row sum 0
             w10 w11 ... w1n                                       -> row sum 1
             the rest, less than a row

    checksum = CRC-32 of the row sums and the rest

It finds every changed word, and rows that have changed places. Of other errors it misses one in 2^32, and words that have
changed places within a row. It finds damage and no forgery, as a CRC does. CRC-32 of the whole piece takes three to ten times
as long, SHA-256 longer.

Rows are summed where a piece lies. For memory of a GPU that takes 1/64 of its bytes to the host, and no pass over host memory.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Bytes = TypeVar("Bytes", memoryview, Tensor)
ROW_BYTES = 512
NO_BYTES = bytes(4)
"""Checksum of no bytes."""
_WORD = np.dtype("<u8")


def piece_checksum(buffers: Sequence[memoryview], before: bytes = NO_BYTES) -> bytes:
    """Checksum of a piece that lies in several buffers, in order: 4 bytes. Part of the format. Releases the GIL.

    Args:
        buffers: bytes of the piece.
        before: checksum of the piece's bytes in front of them, which are whole rows.
    """
    if any(buffer.nbytes % ROW_BYTES for buffer in buffers[:-1]):
        buffers = [memoryview(b"".join(buffers))]  # a row lies in two buffers
    checksum = int.from_bytes(before, "little")
    for buffer in buffers:
        whole = buffer.nbytes // ROW_BYTES * ROW_BYTES
        rows = np.frombuffer(buffer[:whole], _WORD).reshape(-1, ROW_BYTES // _WORD.itemsize)
        sums = np.einsum("ij->i", rows)  # as fast as memory; `sum(1)` takes two to four times as long for short rows
        checksum = zlib.crc32(sums.tobytes(), checksum)
        checksum = zlib.crc32(buffer[whole:], checksum)
    return checksum.to_bytes(4, "little")


def row_sums(views: Sequence[Tensor], piece_bytes: int) -> Tensor:
    """What checksums of consecutive pieces are made of: of each piece the row sums, then the rest. uint8, on the same device.

    Args:
        views: the bytes in order, uint8 in one dimension each, of one device. Little-endian.
        piece_bytes: bytes of every piece but the last.
    """
    pieces = [list(views)]
    if piece_bytes % ROW_BYTES:  # a piece begins within a row of the one before
        pieces = list(runs_of(views, piece_bytes))
    parts = [part for piece in pieces for part in _sums_and_rest(piece)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def sums_bytes(num_bytes: int, piece_bytes: int) -> int:
    """Bytes that `row_sums` gives of pieces of `num_bytes` in all."""
    each = (divmod(min(piece_bytes, num_bytes - begin), ROW_BYTES) for begin in range(0, num_bytes, piece_bytes))
    return sum(rows * _WORD.itemsize + rest for rows, rest in each)


def checksums_of(sums: memoryview, num_bytes: int, piece_bytes: int) -> Iterator[bytes]:
    """The checksum of each piece, as `piece_checksum` gives it.

    Args:
        sums: what `row_sums` gave, in host memory.
        num_bytes: of all pieces.
        piece_bytes: bytes of every piece but the last.
    """
    for begin in range(0, num_bytes, piece_bytes):
        length = sums_bytes(min(piece_bytes, num_bytes - begin), piece_bytes)
        yield zlib.crc32(sums[:length]).to_bytes(4, "little")
        sums = sums[length:]


def runs_of(views: Sequence[Bytes], size: int) -> Iterator[list[Bytes]]:
    """Cut bytes that lie in several views into runs of `size` bytes, the last one shorter. Each run is views, in order."""
    run, room = list[Bytes](), size
    for view in views:
        while len(view):
            part, view = view[:room], view[room:]
            run.append(part)
            room -= len(part)
            if not room:
                yield run
                run, room = [], size
    if run:
        yield run


def _sums_and_rest(flat: list[Tensor]) -> list[Tensor]:
    """The row sums of bytes that lie in several tensors, and the rest behind the last row. uint8."""
    if any(len(each) % ROW_BYTES for each in flat[:-1]) or any(each.storage_offset() % _WORD.itemsize for each in flat):
        flat = [torch.cat(flat)]  # rows that begin at multiples of a word
    rest = len(flat[-1]) % ROW_BYTES
    if rest:
        whole, behind = flat[-1].split([len(flat[-1]) - rest, rest])
        flat = [*flat[:-1], whole]
    rows = [each.view(torch.int64).view(-1, ROW_BYTES // _WORD.itemsize) for each in flat]
    sums = [each.sum(1).view(torch.uint8) for each in rows]  # int64 wraps like uint64
    return [*sums, behind] if rest else sums
