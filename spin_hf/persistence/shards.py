"""Tensors of a saved cache, cut into shards and pieces: names, headers and offsets follow from names, dtypes and shapes.

    spec    "layers.0.pages" bfloat16 [segments, H, pages, elements]        a tensor
    shard   header | part | part | ...                                      a file; part: consecutive indices of dimension 0
    piece   whole rows of a part, at most 4 MiB                             read, written and checked at a time

A reader computes headers from the manifest and compares bytes. It never parses a header, so it trusts no offset and no shape.
A shard's digest is SHA-256 of its header and the checksums of its pieces (`checksum.py`), which threads compute. Checksums
find damage. They do not find a forgery: who can write the files can write checksums that match.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .strict_json import RefusedError

PIECE_BYTES = 4 << 20
"""Bytes that have a checksum of their own, and are written at a time. Part of the format."""
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""The dtypes that can be saved, and their names in safetensors."""
DTYPE_OF = {name: dtype for dtype, name in DTYPES.items()}
MOST_SHARDS = 4096
"""All shards of a saved cache are open at once while it is read."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a saved cache.

    Attributes:
        name: unique in the saved cache.
        dtype, shape: of the whole tensor.
        row_elements: consecutive elements that a piece never separates.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    row_elements: int = 1

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def index_bytes(self) -> int:
        """Bytes of one index along dimension 0; of the tensor if it has no dimension."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.row_elements * self.dtype.itemsize

    @property
    def piece_bytes(self) -> int:
        """Bytes of every piece of a part but the last."""
        return max(1, PIECE_BYTES // self.row_bytes) * self.row_bytes


@dataclass(frozen=True)
class Part:
    """Indices [first, first + count) along dimension 0 of a tensor, or all of it.

    Attributes:
        offset: in the file, in bytes.
    """

    spec: TensorSpec
    first: int
    count: int
    offset: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        return (self.count, *self.spec.shape[1:]) if self.spec.shape else ()

    @property
    def num_bytes(self) -> int:
        """Bytes of the part."""
        return self.count * self.spec.index_bytes

    @property
    def start(self) -> int:
        """Bytes of the tensor before this part."""
        return self.first * self.spec.index_bytes

    def pieces(self) -> Iterator[tuple[int, int]]:
        """[begin, end) bytes of each piece in the part."""
        for begin in range(0, self.num_bytes, self.spec.piece_bytes):
            yield begin, min(begin + self.spec.piece_bytes, self.num_bytes)

    def piece_rows(self) -> Iterator[tuple[int, int]]:
        """[first, stop) rows of the tensor in each piece."""
        for begin, end in self.pieces():
            yield (self.start + begin) // self.spec.row_bytes, (self.start + end) // self.spec.row_bytes


@dataclass(frozen=True)
class Shard:
    """One file: its header, and the parts behind it."""

    name: str
    header: bytes
    parts: tuple[Part, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(part.num_bytes for part in self.parts)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def shard_name(save_id: str, number: int, count: int) -> str:
    """File name of shard `number`, from 1 on."""
    return f"pages-{save_id}-{number:05d}-of-{count:05d}.safetensors"


def cut(specs: Sequence[TensorSpec], most_bytes: int, save_id: str, most_shards: int = MOST_SHARDS) -> list[Shard]:
    """Cut tensors, in order, into shards.

    Args:
        most_bytes: tensor bytes of a shard, unless one index along dimension 0 has more.
        save_id: part of file names and headers, so that files of different saves are never mixed.
    Raises:
        RefusedError: there would be more than `most_shards`.
    """
    groups: list[list[Part]] = [[]]
    room = most_bytes
    for spec in specs:
        first, stop = 0, spec.shape[0] if spec.shape else 1
        while first < stop or (first == stop == 0):
            fits = stop - first if not spec.index_bytes else min(stop - first, max(0, room) // spec.index_bytes)
            if not fits and stop and groups[-1]:
                if len(groups) == most_shards:
                    raise RefusedError(f"at most {most_shards} shards", "more", "raise max_shard_bytes")
                groups.append([])
                room = most_bytes
                continue
            count = max(fits, 1) if stop else 0
            groups[-1].append(Part(spec, first, count))
            room -= count * spec.index_bytes
            first += count
            if not stop:
                break
    return [_shard(parts, number, len(groups), save_id) for number, parts in enumerate(groups, 1)]


def _shard(parts: list[Part], number: int, count: int, save_id: str) -> Shard:
    entries: dict[str, object] = {"__metadata__": {"format": "pt", "spin_hf": f"{save_id} {number} of {count}"}}
    end = 0
    for part in parts:
        whole = part.count == (part.spec.shape[0] if part.spec.shape else 1)
        entries[part.spec.name if whole else f"{part.spec.name}.{part.first}"] = {
            "dtype": DTYPES[part.spec.dtype], "shape": list(part.shape), "data_offsets": [end, end + part.num_bytes],
        }  # fmt: skip
        end += part.num_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    placed, at = [], len(header)
    for part in parts:
        placed.append(Part(part.spec, part.first, part.count, at))
        at += part.num_bytes
    return Shard(shard_name(save_id, number, count), header, tuple(placed))
