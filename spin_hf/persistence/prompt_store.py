"""`PromptStore`: prompts that were read before, recognised by their tokens.

    generate(ids, cache)  ->  before_prompt: longest stored prefix of ids  ->  restored into the empty cache
                          ->  the model reads the rest
                          ->  after_prompt: what the cache holds now is stored

    in memory    forks of the caches, which share their pages; gone with the process
    on disk      folders of `save_pretrained` (`disk_entries.py`); an index in SQLite (`prefix_index.py`)
    pending      forks that wait to be written to the disk (`background_writer.py`); restored from like those in memory

An entry that cannot be read is removed, and the prompt is read by the model.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import uuid
import weakref
from array import array
from collections.abc import Callable, Iterator
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
from .background_writer import BackgroundWriter, PendingPrompt
from .disk_entries import DiskEntries
from .files import folder_path
from .fingerprint import ModelFacts
from .prefix_index import IndexFormatError, PrefixIndex
from .process_forks import Forked, told_of_forks
from .prompt_identity import bytes_of_cache, common_length, only_row, space_of, with_options
from .reader import SavedCache

logger = logging.getLogger("spin_hf")

_MOST_IN_MEMORY = 1000
"""Entries in memory that are compared token by token. On disk, where tokens have to be read first, a few are."""


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
        tokens, space, facts: of `only_row`, `space_of` and `ModelFacts.of`.
    """

    ids: weakref.ref[Tensor]
    tokens: array[int]
    space: str
    facts: ModelFacts | None

    @classmethod
    def of(cls, cache: Any, ids: Tensor, tokens: array[int]) -> _Seen:
        """A prompt for `cache`, whose model is as it is now."""
        facts = ModelFacts.of(cache.calls.model())
        return cls(weakref.ref(ids), tokens, space_of(cache, facts), facts)


@dataclass
class _Counts:
    lookups: int = 0
    hits: int = 0
    reused_tokens: int = 0


@dataclass(frozen=True)
class _Found:
    """The best entry for a prompt, and the number of tokens of it that the prompt begins with.

    Attributes:
        held: the cache to fork; None for an entry on disk.
    """

    name: str
    held: Any
    num_tokens: int
    common: int


class PromptStore:
    """Stored prompts of any models. Safe for several processes and threads at once.

    A prompt is looked up by the tokens of its only sequence, or of a batch of equal ones, without padding. It must begin with a
    whole block of a stored one.

    A thread writes prompts to the disk, so no first token waits for that. It writes a fork, which is freed as soon as it is
    written. Until then the fork holds the memory of the prompt's pages, in either tier, also if its cache ends. At most three
    prompts are pending: one is being written and two wait. A later one takes the place of the oldest that waits. The same model
    restores a pending prompt as one in memory. `wait` waits for the disk, and so does the exit of the process, for minutes.

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
        self.directory: Path | None = None
        self._disk: DiskEntries | None = None
        self._writer = BackgroundWriter(None)
        told_of_forks(self)
        if directory is None:
            if not in_memory:
                raise OptionError(
                    "directory: expected a folder where max_host_bytes is None, got none; pass one of them"
                )
            return
        self.directory = self._writer.place = folder_path(directory)
        try:
            self._disk = DiskEntries(self.directory, self.max_bytes, block_tokens)
        except (OSError, IndexFormatError, sqlite3.Error) as error:
            raise OptionError(
                f"directory: expected a folder of a PromptStore, or an empty one, got {directory}: {error}; pass another folder"
            ) from error

    def stats(self) -> StoreStats:
        """Entries held, and how often they were of use in this process. Prompts that are not on the disk yet do not count."""
        indexes = [self._memory] if self._disk is None else [self._memory, self._disk.index]
        return StoreStats(
            sum(len(index.names()) for index in indexes), sum(index.num_bytes for index in indexes),
            self._counts.lookups, self._counts.hits, self._counts.reused_tokens,
        )  # fmt: skip

    def clear(self) -> None:
        """Remove all entries, on disk too. Prompts that are not on the disk yet will not be stored."""
        with self._lock:
            self._writer.drop_all()
            self._drop_held(self._memory.remove_beyond(-1))
            if self._disk is not None:
                self._disk.clear()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all prompts so far are stored on the disk, or found not to be worth it.

        The process does so itself when it exits, for five minutes at most, but not if it is killed or ends by `os._exit`.

        Args:
            timeout: seconds to wait at most; None for no limit.
        Returns:
            Whether no such prompt is pending.
        """
        return self._writer.wait(timeout)

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
            seen = self._seen[cache] = _Seen.of(cache, ids, tokens)
            for found in self._candidates(cache, tokens, seen.space):
                keep = min(found.common, len(tokens) - 1)
                if not self._restored(cache, found, keep, len(ids)):
                    continue
                cache._state.reused_tokens = keep
                self._counts.hits += 1
                self._counts.reused_tokens += keep
                where = "disk" if found.held is None else "memory"
                logger.info("%d of %d tokens of the prompt restored from %s", keep, len(tokens), where)
                return

    def keep(self, cache: Any, ids: Tensor, mask: Tensor | None) -> None:
        """Store what a cache holds behind a prompt, unless all but its last tokens is stored already.

        In memory a block may be missing, on disk an eighth of the tokens. A thread writes to the disk, from a fork.

        Args:
            cache: a `SpinCache` that holds exactly the prompt.
            ids, mask: as for `restore`.
        """
        seen = self._seen.pop(cache, None)
        seen = None if seen is None or seen.ids() is not ids else seen
        tokens = only_row(ids, mask) if seen is None else seen.tokens
        if tokens is None or len(ids) > 1 or len(tokens) < self._memory.block_tokens:
            return
        if cache.get_seq_length() != len(tokens) or cache.calls.model() is None:
            return
        with self._lock, self._tolerant():
            seen = _Seen.of(cache, ids, tokens) if seen is None else seen
            if self.max_host_bytes:
                self._keep_in_memory(cache, tokens, with_options(seen.space, cache))
            if self._disk is not None:
                self._keep_on_disk(self._disk, cache, seen)

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
        options = with_options(space, cache)
        for match in self._memory.find(options, tokens, most=_MOST_IN_MEMORY):
            held = self._held[match.name]
            if held.model() is cache.calls.model():
                common = common_length(held.ids, tokens, match.shared)
                found.append(_Found(match.name, held.cache, match.num_tokens, common))
        for prompt in self._writer.pending():
            fork = prompt.cache  # None once it is written
            if fork is not None and prompt.options == options and fork.calls.model() is cache.calls.model():
                common = common_length(prompt.ids, tokens, 0)
                if common >= self._memory.block_tokens:
                    found.append(_Found(prompt.name, fork, len(prompt.ids), common))
        if self._disk is not None:
            for match in self._disk.index.find(space, tokens):
                stored = self._disk.tokens_of(match.name)
                if stored is not None:
                    common = common_length(stored, tokens, match.shared)
                    found.append(_Found(match.name, None, match.num_tokens, common))
        croppable = all(is_croppable(layer) for layer in cache.layers)
        usable = [each for each in found if croppable or each.common == each.num_tokens < len(tokens)]
        return sorted(usable, key=lambda each: (-each.common, each.held is None))

    def _restored(self, cache: Any, found: _Found, keep: int, rows: int) -> bool:
        """Restore the first `keep` tokens of an entry, for `rows` sequences. If that fails, the cache is empty again."""
        try:
            if found.held is not None:
                found.held.fork_into(cache)
                self._memory.touch(found.name)
            else:
                assert self._disk is not None
                with closing(SavedCache(self._disk.folder / found.name)) as saved:
                    model = cache.calls.model()
                    saved.restore(cache._state, cache.layers, cache._config, model, ModelFacts.of(model))
                    cache._state.tokens = TokenLog().recorded(0, saved.tokens())
                self._disk.index.touch(found.name)
            if keep < cache.get_seq_length():
                cache.crop(keep - cache.get_seq_length())
            if rows > 1:
                cache.batch_repeat_interleave(rows)
            return True
        except (SavedCacheError, OSError) as error:
            cache.reset()
            if self._disk is not None:
                self._disk.remove(found.name, error)
        except SpinError as error:  # it does not fit the caps of this cache
            cache.reset()
            logger.info("a stored prompt is not restored: %s", error)
        except BaseException:
            cache.reset()
            raise
        return False

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

    def _keep_on_disk(self, disk: DiskEntries, cache: Any, seen: _Seen) -> None:
        """Have the writer's thread write a prompt, unless it is stored or pending but for few tokens."""
        tokens, space = seen.tokens, seen.space
        shared = [common_length(each.ids, tokens, 0) for each in self._writer.pending() if each.space == space]
        if any(disk.has_few_new_tokens(len(tokens), each) for each in shared if each) or disk.holds(space, tokens):
            return
        try:
            self._writer.submit(PendingPrompt.of(cache, tokens, space, seen.facts), self._write)
        except (SpinError, torch.OutOfMemoryError) as error:
            self._writer.warn(error)

    def _write(self, prompt: PendingPrompt) -> None:
        """Write a pending prompt. Called in the writer's thread."""
        assert self._disk is not None
        with self._tolerant():
            self._disk.write(prompt, self._lock)

    def _drop_held(self, names: list[str]) -> None:
        for name in names:
            self._held.pop(name, None)

    def before_fork(self) -> Callable[[bool], None]:
        """Called before the process forks; see `process_forks.py`."""
        parts: list[Forked] = [self._writer, self._memory, *([] if self._disk is None else [self._disk.index])]
        followed = [part.before_fork() for part in parts]

        def after(in_child: bool) -> None:
            if in_child:
                self._lock = threading.RLock()  # another thread may have held it
            for each in reversed(followed):
                each(in_child)

        return after


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
