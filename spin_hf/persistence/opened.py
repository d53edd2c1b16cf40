"""A saved cache that is open for reading: its manifest and files. Several threads read pieces and check them."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from ..config import shown
from ..errors import SavedCacheError, SpinError
from .files import OpenFile, folder_path
from .fills import Fill, PlainTensor
from .fingerprint import tokens_hash
from .manifest import FILE_NAME, MOST_FILE_BYTES, Manifest, parse_manifest
from .shards import Part, Shard, TensorSpec, bytes_of, cut, piece_checksum
from .strict_json import RefusedError

_MOST_THREADS = 8
_TRIES = 3
"""A saved cache may be replaced between the reading of its JSON and the opening of its shards."""
_REMEDY = "save the cache again"


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
        """Content of each file. A subclass sets it: it follows from the method and the options of the new cache."""
        self._checksums: dict[tuple[str, int], bytes] = {}
        """Checksum of each piece read, by file name and offset."""
        try:
            self._open()
        except BaseException as error:
            self.close()
            named = self.named(error)
            if named is error:
                raise
            raise named from error

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

    def read(self, fills: dict[str, Fill]) -> None:
        """Read the tensors that `fills` names into memory, by several threads."""
        pieces = [
            (file, part, begin, end)
            for shard, file in zip(self.shards, self.files, strict=True)
            for part in shard.parts
            if part.spec.name in fills
            for begin, end in part.pieces()
        ]

        def read(piece: tuple[OpenFile, Part, int, int]) -> None:
            with torch.inference_mode(False), torch.no_grad():  # modes of a thread, not of its caller
                self._read_piece(*piece, fills[piece[1].spec.name])

        threads = min(_MOST_THREADS, os.cpu_count() or 1, max(1, len(pieces)))
        with ThreadPoolExecutor(threads, thread_name_prefix="spin_hf_load") as pool:
            try:
                for _ in pool.map(read, pieces):
                    pass
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _read_piece(self, file: OpenFile, part: Part, begin: int, end: int, fill: Fill) -> None:
        target, offset = fill(part.start + begin, part.start + end), part.offset + begin
        views = [bytes_of(buffer) for buffer in target.buffers]
        file.read_into(views, offset)
        if self.verify:
            self._checksums[file.name, offset] = piece_checksum(views)
        if target.finish is not None:
            target.finish()

    def compare_digests(self) -> None:
        """Compare the digests of everything read with the manifest's."""
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
                    content = bytearray(end - begin)
                    file.read_into([memoryview(content)], offset)
                    known = piece_checksum([memoryview(content)])
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
            file.read_into(
                [bytes_of(buffer) for buffer in held.fill(part.start, part.start + part.num_bytes).buffers], begin
            )
        ids = held.finished(torch.device("cpu"))
        if tokens_hash(ids) != made.tokens:
            raise RefusedError("the token ids that their digest belongs to", "other ones (was it altered?)")
        return ids


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
