"""A saved cache that is open for reading: manifest, files, and pieces, which several threads read and compare with digests."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import shown
from ..errors import OptionTypeError, SavedCacheError, SpinError
from .files import OpenFile
from .fills import Fill, PlainTensor
from .fingerprint import tokens_hash
from .manifest import FILE_NAME, MOST_FILE_BYTES, Manifest, parse_manifest
from .shards import Part, Shard, bytes_of
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
        if not isinstance(directory, (str, os.PathLike)):
            raise OptionTypeError(
                f"directory: expected a path, got {type(directory).__name__}; pass the path of a folder"
            )
        self.folder, self.verify = Path(directory), verify
        self.files: list[OpenFile] = []
        self.shards: list[Shard] = []
        """What is in the files. Set by who knows the method and options of the cache."""
        self._digests: dict[tuple[str, int], dict[int, bytes]] = {}
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
        """`error` as one that says which saved cache it is about."""
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

    def read(self, wanted: Callable[[Part], bool], fills: dict[str, Fill]) -> None:
        """Read parts into memory, by several threads."""
        tasks = [
            (number, file, index, part)
            for number, (shard, file) in enumerate(zip(self.shards, self.files, strict=True))
            for index, part in enumerate(shard.parts)
            if wanted(part)
        ]
        pieces = [
            (file, part, begin, end, self._digests.setdefault((self.shards[number].name, index), {}))
            for number, file, index, part in tasks
            for begin, end in part.pieces()
        ]

        def read(task: tuple[OpenFile, Part, int, int, dict[int, bytes]]) -> None:
            file, part, begin, end, digests = task
            with torch.inference_mode(False), torch.no_grad():
                self._read_piece(file, part, begin, end, digests, fills[part.spec.name])

        threads = min(_MOST_THREADS, os.cpu_count() or 1, max(1, len(pieces)))
        if threads == 1:
            for task in pieces:
                read(task)
            return
        with ThreadPoolExecutor(threads, thread_name_prefix="spin_hf_load") as pool:
            try:
                for _ in pool.map(read, pieces):
                    pass
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _read_piece(
        self, file: OpenFile, part: Part, begin: int, end: int, digests: dict[int, bytes], fill: Fill
    ) -> None:
        put = fill(part.start + begin, part.start + end)
        views = [bytes_of(piece) for piece in put]
        file.read_into(views, part.offset + begin)
        if self.verify:
            digest = hashlib.sha256()
            for view in views:
                digest.update(view)
            digests[begin] = digest.digest()
        done = getattr(put, "done", None)
        if done is not None:
            done()

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
        for index, part in enumerate(shard.parts):
            known = self._digests.get((shard.name, index), {})
            for begin, end in part.pieces():
                if begin not in known:  # not needed by the cache, such as token ids
                    content = bytearray(end - begin)
                    file.read_into([memoryview(content)], part.offset + begin)
                    known[begin] = hashlib.sha256(content).digest()
                digest.update(known[begin])
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
        shape = made.batch_size, made.length
        if 8 * shape[0] * shape[1] > sum(file.size for file in self.files):
            raise RefusedError(f"token ids {list(shape)}", "fewer bytes (was it cut?)")
        held = PlainTensor(torch.int64, shape)
        left, at = 8 * shape[0] * shape[1], 0
        for file in self.files:  # they are the first tensor; headers are read for their length only
            length = bytearray(8)
            file.read_into([memoryview(length)], 0)
            begin = 8 + int.from_bytes(length, "little")
            index = 8 * shape[1]
            count = min(left, max(1, made.max_shard_bytes // index) * index, max(0, file.size - begin))
            for piece in held.fill(at, at + count):
                file.read_into([bytes_of(piece)], begin)
            left, at = left - count, at + count
            if not left:
                break
        ids = held.finished(torch.device("cpu"))
        if left or tokens_hash(ids) != made.tokens:
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
