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
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_WORD = np.dtype("<u8")
_ROW_BYTES = 512


def piece_checksum(buffers: Sequence[memoryview]) -> bytes:
    """Checksum of a piece that lies in several buffers, in order: 4 bytes. Part of the format. Releases the GIL."""
    if any(buffer.nbytes % _ROW_BYTES for buffer in buffers[:-1]):
        buffers = [memoryview(b"".join(buffers))]  # a row lies in two buffers
    checksum = 0
    for buffer in buffers:
        whole = buffer.nbytes // _ROW_BYTES * _ROW_BYTES
        rows = np.frombuffer(buffer[:whole], _WORD).reshape(-1, _ROW_BYTES // _WORD.itemsize)
        sums = np.einsum("ij->i", rows)  # as fast as memory; `sum(1)` takes two to four times as long for short rows
        checksum = zlib.crc32(sums.tobytes(), checksum)
        checksum = zlib.crc32(buffer[whole:], checksum)
    return checksum.to_bytes(4, "little")


def checksums_on_device(views: Sequence[Tensor], piece_bytes: int) -> list[bytes]:
    """Checksums of consecutive pieces that lie in memory of a device, as `piece_checksum` gives them. Waits for the device.

    Args:
        views: contiguous tensors of one device, which hold the bytes in order. Little-endian.
        piece_bytes: bytes of every piece but the last.
    """
    flat = [view.reshape(-1).view(torch.uint8) for view in views if view.numel()]
    if not flat:
        return []
    num_bytes, each = sum(map(len, flat)), -(-piece_bytes // _ROW_BYTES) * _WORD.itemsize
    if piece_bytes % _ROW_BYTES and num_bytes > piece_bytes:  # a piece begins within a row of the one before
        return [checksums_on_device([piece], piece_bytes)[0] for piece in torch.cat(flat).split(piece_bytes)]
    sums, rest = _row_sums(flat)
    checksums = [
        zlib.crc32(sums[first : first + each]) for first in range(0, -(-num_bytes // piece_bytes) * each, each)
    ]
    checksums[-1] = zlib.crc32(rest, checksums[-1])
    return [checksum.to_bytes(4, "little") for checksum in checksums]


def _row_sums(flat: list[Tensor]) -> tuple[bytes, bytes]:
    """The row sums of bytes that lie in several tensors, and the rest behind the last row."""
    if any(len(each) % _ROW_BYTES for each in flat[:-1]) or any(
        each.storage_offset() % _WORD.itemsize for each in flat
    ):
        flat = [torch.cat(flat)]  # rows that begin at multiples of a word
    whole = len(flat[-1]) // _ROW_BYTES * _ROW_BYTES
    rows = [*flat[:-1], flat[-1][:whole]]
    words = [each.view(torch.int64).view(-1, _ROW_BYTES // _WORD.itemsize) for each in rows]
    sums = [each.sum(1).cpu().numpy().tobytes() for each in words]  # int64 wraps like uint64
    return b"".join(sums), flat[-1][whole:].cpu().numpy().tobytes()
