"""`PromptStore`: prompts that were read before, recognised by their tokens.

    generate(ids, cache)  ->  before_prompt: longest stored prefix of ids  ->  restored into the empty cache
                          ->  the model reads the rest
                          ->  after_prompt: what the cache holds now is stored

    in memory    forks of the caches, which share their pages; gone with the process
    on disk      folders of `save_pretrained`, in `entries/`; an index in SQLite (`prefix_index.py`)

    directory/   index.sqlite   entries/<name>/   entries/<name>.new/ while it is written

An entry enters the index once its folder is complete, and leaves it before its folder goes. So other processes see whole
entries or none. An entry that cannot be read is removed, and the prompt is read by the model.
"""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import threading
import time
import uuid
import weakref
from array import array
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import MOST_BYTES, parse_bytes, require_count
from ..errors import OptionError, OptionTypeError, SavedCacheError, SpinError
from ..integration.layer_types import is_croppable
from ..storage.token_log import TokenLog
from .files import folder_path
from .opened import saved_tokens
from .prefix_index import IndexFormatError, PrefixIndex
from .prompt_identity import bytes_of_cache, common_length, only_row, row_of, space_of, with_options
from .reader import SavedCache

logger = logging.getLogger("spin_hf")

_LEFT_BEHIND_S = 3600.0
"""Seconds after which a folder that is in no index was left by a killed process."""
_MOST_IN_MEMORY = 1000
"""Entries in memory that are compared token by token. On disk, where tokens have to be read first, a few are."""
_NEW_PART = 8
"""On disk, a prompt is stored if more than this part of its tokens (1/8) is in no entry yet. In memory: more than a block."""


@dataclass(frozen=True)
class StoreStats:
    """Contents and use of a store.

    Attributes:
        entries, stored_bytes: prefixes held, in memory and on disk. Pages that entries in memory share count once.
        lookups: prompts looked up.
        hits: those of which a stored prefix was restored.
        reused_tokens: tokens restored, over all hits.
    """

    entries: int
    stored_bytes: int
    lookups: int
    hits: int
    reused_tokens: int


@dataclass
class _Held:
    """An entry in memory: a cache that nobody steps, and the tokens that it holds."""

    cache: Any
    ids: array[int]
    model: weakref.ref[Any]


@dataclass
class _Seen:
    """A prompt that was looked up and is being read.

    Attributes:
        ids: the tensor that it came as.
        tokens, space: of `only_row` and `space_of`.
    """

    ids: weakref.ref[Tensor]
    tokens: array[int]
    space: str


@dataclass
class _Counts:
    lookups: int = 0
    hits: int = 0
    reused_tokens: int = 0


@dataclass(frozen=True)
class _Found:
    """The best entry for a prompt, and the number of tokens of it that the prompt begins with."""

    name: str
    is_held: bool
    num_tokens: int
    common: int


class PromptStore:
    """Stored prompts of any models. Safe for several processes and threads at once.

    A prompt is looked up by the tokens of its only sequence, or of a batch of equal ones, without padding. It must begin with a
    whole block of a stored one.

    Args:
        directory: folder of entries that outlive the process; made if it does not exist. None for entries in memory only.
        max_bytes: cap on the entries on disk, in bytes or as "50GiB"; "auto" for none. The least recently used ones go first.
        max_host_bytes: likewise of entries in memory; None for none in memory. "auto" is half of the machine's memory if
            `directory` is None, else none in memory. Summaries of entries stay in GPU memory, and pages where they are.
        block_tokens: tokens of a block.
    Raises:
        OptionTypeError, OptionError: an argument is invalid, or `directory` cannot be used.
    """

    def __init__(
        self, directory: str | os.PathLike[str] | None = None, *, max_bytes: int | str = "auto",
        max_host_bytes: int | str | None = "auto", block_tokens: int = 256,
    ) -> None:  # fmt: skip
        block_tokens = require_count("block_tokens", block_tokens, 1, example=256)
        self.max_bytes = parse_bytes("max_bytes", max_bytes) or MOST_BYTES
        in_memory = max_host_bytes is not None and (directory is None or max_host_bytes != "auto")
        self.max_host_bytes = 0
        if in_memory and max_host_bytes is not None:
            self.max_host_bytes = parse_bytes("max_host_bytes", max_host_bytes) or _half_of_memory()
        self._memory = PrefixIndex(None, block_tokens)
        self._held: dict[str, _Held] = {}
        self._counts, self._lock = _Counts(), threading.RLock()
        self._seen: weakref.WeakKeyDictionary[Any, _Seen] = weakref.WeakKeyDictionary()
        """By cache: what `restore` found out about the prompt and `keep` needs again."""
        self.directory, self._disk = None, None
        if directory is None:
            if not in_memory:
                raise OptionError(
                    "directory: expected a folder where max_host_bytes is None, got none; pass one of them"
                )
            return
        self.directory = folder_path(directory)
        try:
            self._entries.mkdir(parents=True, exist_ok=True)
            self._disk = PrefixIndex(self.directory / "index.sqlite", block_tokens)
            self._sweep()
        except (OSError, IndexFormatError, sqlite3.Error) as error:
            raise OptionError(
                f"directory: expected a folder of a PromptStore, or an empty one, got {directory}: {error}; pass another folder"
            ) from error

    @property
    def _entries(self) -> Path:
        assert self.directory is not None
        return self.directory / "entries"

    def stats(self) -> StoreStats:
        """Entries held, and how often they were of use in this process."""
        indexes = [self._memory] if self._disk is None else [self._memory, self._disk]
        return StoreStats(
            sum(len(index.names()) for index in indexes), sum(index.num_bytes for index in indexes),
            self._counts.lookups, self._counts.hits, self._counts.reused_tokens,
        )  # fmt: skip

    def clear(self) -> None:
        """Remove all entries, on disk too."""
        with self._lock:
            self._drop_held(self._memory.remove_beyond(-1))
            if self._disk is not None:
                self._delete_folders(self._disk.remove_beyond(-1))

    def __repr__(self) -> str:
        return f"PromptStore({str(self.directory) if self.directory is not None else None!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptStore:
        return self  # copies of a cache use the same store

    # --------------------------------------------------------------------------------------------- called by the caches

    def restore(self, cache: Any, ids: Tensor, mask: Tensor | None) -> None:
        """Fill an empty cache with the longest stored prefix of a prompt, if there is one. At least one token is left to read.

        Args:
            cache: a `SpinCache` without tokens.
            ids: [B, n], the prompt.
            mask: [B, n], its padding mask; None for no padding.
        """
        tokens = only_row(ids, mask)
        if tokens is None or cache.calls.model() is None:
            return
        with self._lock, self._tolerant():
            self._counts.lookups += 1
            space = space_of(cache)
            self._seen[cache] = _Seen(weakref.ref(ids), tokens, space)
            for found in self._candidates(cache, tokens, space):
                keep = min(found.common, len(tokens) - 1)
                if not self._restored(cache, found, keep, len(ids)):
                    continue
                cache._state.reused_tokens = keep
                self._counts.hits += 1
                self._counts.reused_tokens += keep
                where = "memory" if found.is_held else "disk"
                logger.info("%d of %d tokens of the prompt restored from %s", keep, len(tokens), where)
                return

    def keep(self, cache: Any, ids: Tensor, mask: Tensor | None) -> None:
        """Store what a cache holds behind a prompt, unless all but its last tokens is stored already.

        In memory a block may be missing, on disk an eighth of the tokens.

        Args:
            cache: a `SpinCache` that holds exactly the prompt.
            ids, mask: as for `restore`.
        """
        seen = self._seen.pop(cache, None)
        known = seen is not None and seen.ids() is ids
        tokens = seen.tokens if seen is not None and known else only_row(ids, mask)
        if tokens is None or len(ids) > 1 or len(tokens) < self._memory.block_tokens:
            return
        if cache.get_seq_length() != len(tokens) or cache.calls.model() is None:
            return
        with self._lock, self._tolerant():
            space = seen.space if seen is not None and known else space_of(cache)
            if self.max_host_bytes:
                self._keep_in_memory(cache, tokens, with_options(space, cache))
            if self._disk is not None:
                self._keep_on_disk(self._disk, cache, tokens, space)

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        """Log that the index could not be read or written. The prompt is then read by the model, or not stored."""
        try:
            yield
        except sqlite3.Error as error:
            logger.warning("the index of stored prompts in %s cannot be used: %s", self.directory, error)

    # ---------------------------------------------------------------------------------------------------------- lookups

    def _candidates(self, cache: Any, tokens: array[int], space: str) -> list[_Found]:
        """Entries that begin like a prompt, the longest common prefix first; in memory before on disk."""
        found = []
        for match in self._memory.find(with_options(space, cache), tokens, most=_MOST_IN_MEMORY):
            held = self._held[match.name]
            if held.model() is cache.calls.model():
                common = common_length(held.ids, tokens, match.shared)
                found.append(_Found(match.name, True, match.num_tokens, common))
        if self._disk is not None:
            for match in self._disk.find(space, tokens):
                stored = self._tokens_of(match.name)
                if stored is not None:
                    common = common_length(stored, tokens, match.shared)
                    found.append(_Found(match.name, False, match.num_tokens, common))
        croppable = all(is_croppable(layer) for layer in cache.layers)
        usable = [each for each in found if croppable or each.common == each.num_tokens < len(tokens)]
        return sorted(usable, key=lambda each: (-each.common, not each.is_held))

    def _restored(self, cache: Any, found: _Found, keep: int, rows: int) -> bool:
        """Restore the first `keep` tokens of an entry, for `rows` sequences. If that fails, the cache is empty again."""
        try:
            if found.is_held:
                self._held[found.name].cache.fork_into(cache)
                self._memory.touch(found.name)
            else:
                assert self._disk is not None
                with closing(SavedCache(self._entries / found.name)) as saved:
                    saved.restore(cache._state, cache.layers, cache._config, cache.calls.model())
                    cache._state.tokens = TokenLog().recorded(0, saved.tokens())
                self._disk.touch(found.name)
            if keep < cache.get_seq_length():
                cache.crop(keep - cache.get_seq_length())
            if rows > 1:
                cache.batch_repeat_interleave(rows)
            return True
        except (SavedCacheError, OSError) as error:
            cache.reset()
            self._remove(found.name, error)
        except SpinError as error:  # it does not fit the caps of this cache
            cache.reset()
            logger.info("a stored prompt is not restored: %s", error)
        except BaseException:
            cache.reset()
            raise
        return False

    def _tokens_of(self, name: str) -> array[int] | None:
        """The tokens of an entry on disk; None, and the entry is removed, if they cannot be read."""
        try:
            stored = saved_tokens(self._entries / name)
        except (SpinError, OSError) as error:
            self._remove(name, error)
            return None
        return None if stored is None else row_of(stored)

    # ---------------------------------------------------------------------------------------------------------- storing

    def _keep_in_memory(self, cache: Any, tokens: array[int], space: str) -> None:
        shared, covered = 0, []
        croppable = all(is_croppable(layer) for layer in cache.layers)
        for match in self._memory.find(space, tokens, most=_MOST_IN_MEMORY):
            held = self._held[match.name]
            common = common_length(held.ids, tokens, match.shared)
            is_whole = common == len(held.ids)
            if held.model() is not cache.calls.model() or not (is_whole or croppable):
                continue  # it cannot serve this prompt
            if len(tokens) - common <= self._memory.block_tokens:
                return
            if is_whole:
                covered.append(match.name)
            else:
                shared = max(shared, common)
        per_token = -(-bytes_of_cache(cache) // len(tokens))
        name = uuid.uuid4().hex
        self._held[name] = _Held(cache.fork(), tokens, weakref.ref(cache.calls.model()))
        self._memory.insert(name, space, tokens, per_token * (len(tokens) - shared))
        for old in covered:
            self._memory.remove(old)
        self._drop_held(covered + self._memory.remove_beyond(self.max_host_bytes, keep=name))

    def _keep_on_disk(self, disk: PrefixIndex, cache: Any, tokens: array[int], space: str) -> None:
        covered = []
        for match in disk.find(space, tokens):
            if len(tokens) - match.shared <= max(disk.block_tokens, len(tokens) // _NEW_PART):
                return
            stored = self._tokens_of(match.name)
            if stored is not None and common_length(stored, tokens, match.shared) == len(stored):
                covered.append(match.name)
        name = uuid.uuid4().hex
        unfinished = self._entries / f"{name}.new"
        try:
            cache.save_pretrained(unfinished, tokens=torch.frombuffer(tokens, dtype=torch.int64)[None])
            num_bytes = sum(file.stat().st_size for file in unfinished.iterdir())
            if num_bytes > self.max_bytes:
                return
            unfinished.rename(self._entries / name)
        except (SpinError, OSError) as error:
            logger.warning("a prompt could not be stored in %s: %s", self.directory, error)
            return
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)  # nothing is there once it is renamed
        disk.insert(name, space, tokens, num_bytes)
        removed = [old for old in covered if disk.remove(old)]
        self._delete_folders(removed + disk.remove_beyond(self.max_bytes, keep=name))

    def _drop_held(self, names: list[str]) -> None:
        for name in names:
            self._held.pop(name, None)

    def _remove(self, name: str, error: Exception) -> None:
        """Remove an entry on disk that cannot be read. It may be another process's that has just removed it."""
        assert self._disk is not None
        if self._disk.remove(name):
            logger.warning("a stored prompt cannot be restored and is removed: %s", error)
            self._delete_folders([name])

    def _delete_folders(self, names: list[str]) -> None:
        for name in names:
            shutil.rmtree(self._entries / name, ignore_errors=True)

    def _sweep(self) -> None:
        """Delete folders that a killed process left behind, and entries whose folder is gone."""
        assert self._disk is not None
        known, now = set(self._disk.names()), time.time()
        for folder in self._entries.iterdir():
            if folder.name not in known:
                try:
                    old = now - folder.stat().st_mtime > _LEFT_BEHIND_S
                except OSError:
                    continue  # another process has deleted it
                if old and folder.name not in self._disk.names():
                    shutil.rmtree(folder, ignore_errors=True)
        for name in known:
            if not (self._entries / name).exists():
                self._disk.remove(name)


def checked_store(store: Any) -> PromptStore | None:
    """`store`, or OptionTypeError if it is none."""
    if store is not None and not isinstance(store, PromptStore):
        raise OptionTypeError(f"store: expected a PromptStore, got {type(store).__name__}; pass PromptStore(directory)")
    return store


def _half_of_memory() -> int:
    """Half of the machine's memory in bytes; no cap where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return MOST_BYTES
