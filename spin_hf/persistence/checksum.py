"""The checksum of a piece of a tensor: as fast as its memory is read, so that a verified load is as fast as any other.

    piece    rows of 512 words of 64 bits             sums, modulo 2^64
             w00 w01 ... w0n                          -> row sum 0
             w10 w11 ... w1n                          -> row sum 1
              |   |       |
             column sums
             the rest, less than a row

    checksum = CRC-32 of row sums, column sums and the rest

It finds every changed word, and rows or words that have changed places. Of other errors it misses one in 2^32. It finds damage
and no forgery, as a CRC does. CRC-32 of the whole piece takes three to ten times as long, SHA-256 longer.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

_WORD = np.dtype("<u8")
_ROW_BYTES = 512 * _WORD.itemsize


def piece_checksum(buffers: Sequence[memoryview]) -> bytes:
    """Checksum of a piece that lies in several buffers, in order: 4 bytes. Part of the format. Releases the GIL."""
    if any(buffer.nbytes % _ROW_BYTES for buffer in buffers[:-1]):
        buffers = [memoryview(b"".join(buffers))]  # a row lies in two buffers
    checksum, columns = 0, np.zeros(_ROW_BYTES // _WORD.itemsize, _WORD)
    for buffer in buffers:
        words = np.frombuffer(buffer, np.uint8)[: buffer.nbytes // _ROW_BYTES * _ROW_BYTES].view(_WORD)
        rows = words.reshape(-1, len(columns))
        checksum = zlib.crc32(rows.sum(1, dtype=_WORD).tobytes(), checksum)
        columns += rows.sum(0, dtype=_WORD)
    checksum = zlib.crc32(columns.tobytes(), checksum)
    rest = buffers[-1][buffers[-1].nbytes // _ROW_BYTES * _ROW_BYTES :] if buffers else b""
    return zlib.crc32(rest, checksum).to_bytes(4, "little")
