"""Checksums of pieces: the same however a piece is cut into buffers, another one for any damage."""

from __future__ import annotations

import itertools
import random
import zlib

import pytest
import torch

from spin_hf.persistence.checksum import checksums_of, piece_checksum, row_sums, sums_bytes
from spin_hf.persistence.shards import bytes_of

ROW = 512


def _piece(size: int, seed: int = 0) -> bytearray:
    return bytearray(random.Random(seed).randbytes(size))


def _of(piece: bytearray | bytes) -> bytes:
    return piece_checksum([memoryview(piece)])


def test_by_the_formula() -> None:
    piece = _piece(3 * ROW + 20)
    words = [int.from_bytes(piece[at : at + 8], "little") for at in range(0, 3 * ROW, 8)]
    rows = [sum(words[at : at + 64]) % 2**64 for at in range(0, 192, 64)]
    content = b"".join(number.to_bytes(8, "little") for number in rows) + piece[3 * ROW :]
    assert _of(piece) == zlib.crc32(content).to_bytes(4, "little")


@pytest.mark.parametrize("size", [0, 1, 7, 8, ROW - 1, ROW, ROW + 1, 3 * ROW + 20])
def test_however_it_is_cut(size: int) -> None:
    piece, draw = _piece(size), random.Random(size)
    expected = _of(piece)
    for _ in range(8):
        cuts = sorted(draw.choices(range(size + 1), k=draw.randrange(4)))
        if draw.random() < 0.3:
            cuts = [at // ROW * ROW for at in cuts]
        views = [memoryview(piece)[start:stop] for start, stop in zip([0, *cuts], [*cuts, size], strict=True)]
        assert piece_checksum(views) == expected, cuts
        front = draw.randrange(size // ROW + 1) * ROW
        before = piece_checksum([memoryview(piece)[:front]])
        assert piece_checksum([memoryview(piece)[front:]], before) == expected, front
    assert piece_checksum([]) == _of(b"")


@pytest.mark.parametrize("seed", range(6))
def test_any_damage_is_found(seed: int) -> None:
    draw = random.Random(seed)
    piece = _piece(4 * ROW + draw.randrange(64), seed)
    expected = _of(piece)
    for _ in range(200):
        damaged, at = bytearray(piece), draw.randrange(len(piece) - 16)
        kind = draw.randrange(5)
        if kind == 0:  # a bit
            damaged[at] ^= 1 << draw.randrange(8)
        elif kind == 1:  # a run of bytes
            damaged[at : at + 16] = draw.randbytes(16)
        elif kind == 2:  # a block that was not written
            damaged[at // ROW * ROW : at // ROW * ROW + ROW] = bytes(len(damaged[at // ROW * ROW :][:ROW]))
        elif kind == 3:  # words of two rows that have changed places
            one, other = (row * ROW + draw.randrange(ROW // 8) * 8 for row in draw.sample(range(4), 2))
            damaged[one : one + 8], damaged[other : other + 8] = piece[other : other + 8], piece[one : one + 8]
        else:  # rows that have changed places
            one, other = (draw.randrange(4) * ROW for _ in range(2))
            damaged[one : one + ROW], damaged[other : other + ROW] = piece[other : other + ROW], piece[one : one + ROW]
        assert (_of(damaged) == expected) == (damaged == piece), kind
    assert _of(piece[:-1]) != expected


@pytest.mark.parametrize("size", [1, 7, ROW - 1, ROW, 2 * ROW, 2 * ROW + 20, 8 * ROW + 511])
@pytest.mark.parametrize("piece_bytes", [ROW, 2 * ROW, 3 * ROW + 8, 700])
def test_on_a_device(piece_bytes: int, size: int) -> None:
    """As in host memory, for tensors that begin and end anywhere."""
    content, draw = _piece(size + 16), random.Random(size)
    for _ in range(6):
        first = draw.choice([0, 8, 3])
        held = torch.frombuffer(content, dtype=torch.uint8)[first : first + size]
        cuts = [
            0,
            *sorted(draw.choices([0, *range(0, size + 1, 4), *range(0, size + 1, ROW)], k=draw.randrange(4))),
            size,
        ]
        views = [held[start:stop] for start, stop in itertools.pairwise(cuts)]
        expected = [_of(bytes(piece.tolist())) for piece in held.split(piece_bytes)]
        sums = row_sums(views, piece_bytes)
        assert len(sums) == sums_bytes(size, piece_bytes)
        assert list(checksums_of(bytes_of(sums), size, piece_bytes)) == expected, cuts
