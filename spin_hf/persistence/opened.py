"""A saved cache that is open for reading: its manifest and files. Several threads read pieces and check them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import shown
from ..errors import SavedCacheError, SpinError
from .checksum import NO_BYTES, checksums_of, piece_checksum, row_sums, runs_of, sums_bytes
from .files import OpenFile, folder_path
from .fills import Destination, PlainTensor
from .fingerprint import tokens_hash
from .manifest import FILE_NAME, MOST_FILE_BYTES, Manifest, parse_manifest
from .piece_reader import PieceReader
from .shards import Part, Shard, TensorSpec, bytes_of, cut
from .staging import Staging
from .strict_json import RefusedError

_MOST_THREADS = 12
"""Threads that read. They share Python's lock between blocks."""
_UNIT_BYTES = 64 << 20
"""Bytes of whole pieces that a thread takes at a time. A GPU sums their rows with one launch."""
_CHECKED_BYTES = 2 << 20
"""Bytes that are read into host memory at a time; a multiple of 512. They are summed from the processor's cache."""
_TRIES = 3
"""A saved cache may be replaced between the reading of its JSON and the opening of its shards."""
_REMEDY = "save the cache again"


class Unit(NamedTuple):
    """Bytes [begin, end) of a part in a file, whole pieces, and where they go. One thread reads them."""

    file: OpenFile
    part: Part
    begin: int
    end: int
    destination: Destination


class OpenCache:
    """A saved cache, open for reading. `close` closes the files.

    Args:
        directory: where it is.
        verify: whether to compare digests while reading.
    Raises:
        OptionTypeError: `directory` is not a path.
        SavedCacheError: there is none, or it is damaged.
    """

    def __init__(self, directory: Any, verify: bool = True) -> None:
        self.folder, self.verify = folder_path(directory), verify
        self.files: list[OpenFile] = []
        self.shards: list[Shard] = []
        """Content of each file, once `set_shards` was called."""
        self._parts: dict[str, list[tuple[Part, OpenFile]]] = {}
        """The parts of each tensor."""
        self._checksums: dict[tuple[str, int], bytes] = {}
        """Checksum of each piece read, by file name and offset."""
        try:
            self._open()
        except BaseException as error:
            self.close()
            named = self.named(error)
            try:
                if named is error:
                    raise
                raise named from error
            finally:
                del named  # error, traceback and this frame would be a cycle, which keeps them alive

    def _open(self) -> None:
        for left in reversed(range(_TRIES)):
            try:
                self.manifest = parse_manifest(self._text())
                self.files = []
                for name, _, _ in self.manifest.shards:
                    self.files.append(OpenFile(self.folder / _plain(name), name))
                return
            except FileNotFoundError:
                self.close()
                if not left:
                    raise

    def _text(self) -> bytes:
        with closing(OpenFile(self.folder / FILE_NAME, FILE_NAME)) as file:
            if file.size > MOST_FILE_BYTES:
                raise RefusedError(f"{FILE_NAME} of at most {MOST_FILE_BYTES} bytes", f"{file.size} bytes")
            text = bytearray(file.size)
            file.read_into([memoryview(text)], 0)
            return bytes(text)

    def named(self, error: BaseException) -> BaseException:
        """`error` as a SavedCacheError that names this folder; itself if it is an error of another kind."""
        where = shown(str(self.folder))
        if isinstance(error, RefusedError):
            expected, got, *remedy = error.args
            remedy = remedy or [_REMEDY]
            return SavedCacheError(f"saved cache: expected {expected}, got {got} in {where}; {remedy[0]}")
        if isinstance(error, (OSError, ValueError)) and not isinstance(error, SpinError):
            what = error.strerror if isinstance(error, OSError) else str(error)
            return SavedCacheError(
                f"saved cache: expected a folder that SpinCache.save_pretrained wrote, got {what} in {where}; pass its path"
            )
        return error

    def close(self) -> None:
        """Close the files."""
        while self.files:
            self.files.pop().close()

    def set_shards(self, shards: list[Shard]) -> None:
        """Set the content of each file. It follows from the method and the options of the new cache."""
        self.shards, self._parts = shards, {}
        for shard, file in zip(shards, self.files, strict=True):
            for part in shard.parts:
                self._parts.setdefault(part.spec.name, []).append((part, file))

    def reader(self, names: Collection[str] | None = None) -> PieceReader[Unit]:
        """Threads that read pieces of tensors into memory, to be used as a context manager.

        Args:
            names: of the tensors that will be read; None for all.
        """
        parts = [part for shard in self.shards for part in shard.parts if names is None or part.spec.name in names]
        num_units = sum(len(_units(part)) for part in parts)
        return PieceReader(self._read, max(1, min(_MOST_THREADS, os.cpu_count() or 1, num_units)))

    def reads(self, destinations: Mapping[str, Destination]) -> Iterator[Unit]:
        """What threads read of the tensors that `destinations` names, with where it goes."""
        for name, destination in destinations.items():
            for part, file in self._parts.get(name, ()):
                for begin, end in _units(part):
                    yield Unit(file, part, begin, end, destination)

    def _read(self, unit: Unit, staging: Staging) -> None:
        file, part, begin, end, destination = unit
        start, piece_bytes = part.start, part.spec.piece_bytes
        if not destination.is_direct:
            for first in range(begin, end, piece_bytes):
                buffer = staging.buffer(min(piece_bytes, end - first))
                self._read_pieces(file, [bytes_of(buffer)], part.offset + first, piece_bytes)
                destination.put(start + first, buffer, staging)
            return
        views, offset = destination.views(start + begin, start + end), part.offset + begin
        if not destination.is_on_gpu:
            self._read_pieces(file, [bytes_of(view) for view in views], offset, piece_bytes)
            return
        with staging.upload(views[0].device) as upload:
            upload.read(file.read_into, offset, views)
            if self.verify:
                num_bytes, made = sums_bytes(end - begin, piece_bytes), partial(row_sums, views, piece_bytes)
                upload.fetch(num_bytes, made, partial(self._note_sums, file.name, offset, end - begin, piece_bytes))

    def _read_pieces(self, file: OpenFile, views: list[memoryview], offset: int, piece_bytes: int) -> None:
        """Read whole pieces into host memory, and note their checksums."""
        if not self.verify:
            file.read_into(views, offset)
            return
        for piece in runs_of(views, piece_bytes):
            at, checksum = offset, NO_BYTES
            for block in runs_of(piece, _CHECKED_BYTES):
                file.read_into(block, offset)
                checksum = piece_checksum(block, checksum)  # while the block is in the processor's cache
                offset += sum(map(len, block))
            self._checksums[file.name, at] = checksum

    def _note_sums(self, name: str, offset: int, num_bytes: int, piece_bytes: int, sums: memoryview) -> None:
        """Note the checksums of pieces, from the row sums that a GPU has computed."""
        for checksum in checksums_of(sums, num_bytes, piece_bytes):
            self._checksums[name, offset] = checksum
            offset += piece_bytes

    def compare_digests(self) -> None:
        """Compare the digests of everything read with the manifest's. The threads have ended."""
        if not self.verify:
            return
        for shard, file, (name, _, expected) in zip(self.shards, self.files, self.manifest.shards, strict=True):
            if self._digest(shard, file) != expected:
                raise RefusedError(
                    f"the content of {name} that its digest belongs to", "other content (was it altered?)"
                )

    def _digest(self, shard: Shard, file: OpenFile) -> str:
        digest = hashlib.sha256(shard.header)
        for part in shard.parts:
            for begin, end in part.pieces():
                offset = part.offset + begin
                known = self._checksums.get((file.name, offset))
                if known is None:  # the cache does not need this tensor, such as token ids
                    content = memoryview(bytearray(end - begin))
                    file.read_into([content], offset)
                    known = piece_checksum([content])
                digest.update(known)
        return digest.hexdigest()

    def tokens(self) -> Tensor | None:
        """The token ids [B, tokens] that were saved, int64; None if they were not. Reads nothing else.

        Raises:
            SavedCacheError: they are damaged.
        """
        made = self.manifest
        if made.tokens is None:
            return None
        try:
            return self._tokens(made)
        except (RefusedError, OSError) as error:
            raise self.named(error) from error

    def _tokens(self, made: Manifest) -> Tensor:
        spec = TensorSpec("tokens", torch.int64, (made.batch_size, made.length))
        if spec.num_bytes > sum(file.size for file in self.files):
            raise RefusedError(f"token ids {list(spec.shape)}", "fewer bytes (was it cut?)")
        held = PlainTensor(spec.dtype, spec.shape)
        # They are the first tensor. The other tensors change the lengths of the headers, and not how it is cut.
        shards = cut([spec], made.max_shard_bytes, made.save_id, len(self.files))
        for shard, file in zip(shards, self.files, strict=False):
            (part,) = shard.parts
            length = bytearray(8)
            file.read_into([memoryview(length)], 0)
            begin = 8 + int.from_bytes(length, "little")
            if begin + part.num_bytes > file.size:
                raise RefusedError(f"{part.num_bytes} bytes of token ids in {file.name}", "fewer (was it cut?)")
            views = held.views(part.start, part.start + part.num_bytes)
            file.read_into([bytes_of(view) for view in views], begin)
        ids = held.finished(torch.device("cpu"))
        if tokens_hash(ids) != made.tokens:
            raise RefusedError("the token ids that their digest belongs to", "other ones (was it altered?)")
        return ids


def _units(part: Part) -> list[tuple[int, int]]:
    """[begin, end) bytes of a part that a thread takes at a time: whole pieces, of `_UNIT_BYTES` if they are smaller."""
    step = max(1, _UNIT_BYTES // part.spec.piece_bytes) * part.spec.piece_bytes
    return [(begin, min(begin + step, part.num_bytes)) for begin in range(0, part.num_bytes, step)]


def _plain(name: str) -> str:
    """A file name without a path."""
    if name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name or ":" in name or "\0" in name:
        raise RefusedError("names of shards without a path", shown(name, 80))
    return name


def saved_tokens(directory: Any) -> Tensor | None:
    """Token ids [B, tokens] of a saved cache, int64; None if they were not saved.

    Raises:
        SavedCacheError: there is no saved cache, or it is damaged.
    """
    with closing(OpenCache(directory)) as saved:
        return saved.tokens()
