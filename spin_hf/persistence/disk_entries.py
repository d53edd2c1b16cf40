"""The entries of a `PromptStore` on disk.

    directory/   index.sqlite   entries/<name>/   entries/<name>.new/ while it is written

An entry enters the index once its folder is complete, and leaves it before its folder goes. So other processes see whole
entries or none. An entry that cannot be read is removed.
"""

from __future__ import annotations

import logging
import shutil
import time
from array import array
from contextlib import AbstractContextManager
from pathlib import Path

from ..errors import SpinError
from .background_writer import PendingPrompt
from .opened import saved_tokens
from .prefix_index import PrefixIndex
from .prompt_identity import common_length, row_of

logger = logging.getLogger("spin_hf")

_LEFT_BEHIND_S = 3600.0
"""Seconds after which a folder that is in no index was left by a killed process."""
_NEW_PART = 8
"""A prompt is stored if more than this part of its tokens (1/8) is in no entry yet, and more than a block."""


class DiskEntries:
    """Folders of saved caches and their index.

    Args:
        directory: of the store; made if it does not exist.
        max_bytes: cap on the entries.
        block_tokens: tokens of a block.
    Raises:
        OSError, IndexFormatError, sqlite3.Error: the directory cannot be used.
    """

    def __init__(self, directory: Path, max_bytes: int, block_tokens: int) -> None:
        self.folder, self.max_bytes = directory / "entries", max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self.index = PrefixIndex(directory / "index.sqlite", block_tokens)
        self._sweep()

    def has_few_new_tokens(self, num_tokens: int, shared: int) -> bool:
        """Whether a prompt of so many tokens, of which an entry has `shared`, is not worth an entry."""
        return num_tokens - shared <= max(self.index.block_tokens, num_tokens // _NEW_PART)

    def holds(self, space: str, ids: array[int]) -> bool:
        """Whether an entry has all of a prompt but few tokens."""
        return any(self.has_few_new_tokens(len(ids), match.shared) for match in self.index.find(space, ids))

    def write(self, prompt: PendingPrompt, lock: AbstractContextManager[object]) -> None:
        """Make a prompt an entry, instead of those that it begins with. Nothing is left of it after an error.

        Args:
            lock: held while the prompt enters the index, unless it has been dropped.
        Raises:
            SpinError, OSError, sqlite3.Error: it could not be written.
            StoppedError: it was dropped.
        """
        if self._holds(prompt):
            return
        covered = self._covered_by(prompt)
        folder, unfinished = self.folder / prompt.name, self.folder / f"{prompt.name}.new"
        try:
            unfinished.mkdir()  # not its parents: somebody may have removed the folder of the store
            num_bytes = prompt.save(unfinished)
            if num_bytes > self.max_bytes:
                return
            with lock:
                if prompt.is_dropped:
                    return
                if not self.index.is_in_place():
                    raise FileNotFoundError(f"{self.index.file} was removed; make a new PromptStore")
                unfinished.rename(folder)
                with self.index.changing():  # a process that is killed here leaves no more entries than the cap allows
                    is_new = self.index.insert(
                        prompt.name, prompt.space, prompt.ids, num_bytes, lambda: self._holds(prompt)
                    )
                    gone = [old for old in covered if self.index.remove(old)] if is_new else [prompt.name]
                    gone += self.index.remove_beyond(self.max_bytes, keep=prompt.name)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)  # nothing is there once it is renamed
        self._delete_folders(gone)  # its own, if another process was faster

    def _holds(self, prompt: PendingPrompt) -> bool:
        return self.holds(prompt.space, prompt.ids)

    def _covered_by(self, prompt: PendingPrompt) -> list[str]:
        """Entries of which a prompt has all tokens."""
        covered = []
        for match in self.index.find(prompt.space, prompt.ids):
            stored = self.tokens_of(match.name)
            if stored is not None and common_length(stored, prompt.ids, match.shared) == len(stored):
                covered.append(match.name)
        return covered

    def tokens_of(self, name: str) -> array[int] | None:
        """The tokens of an entry; None, and the entry is removed, if they cannot be read."""
        try:
            stored = saved_tokens(self.folder / name)
        except (SpinError, OSError) as error:
            self.remove(name, error)
            return None
        return None if stored is None else row_of(stored)

    def remove(self, name: str, error: Exception) -> None:
        """Remove an entry that cannot be read. It may be another process's that has just removed it."""
        if self.index.remove(name):
            logger.warning("a stored prompt cannot be restored and is removed: %s", error)
            self._delete_folders([name])

    def clear(self) -> None:
        """Remove all entries."""
        self._delete_folders(self.index.remove_beyond(-1))

    def _delete_folders(self, names: list[str]) -> None:
        for name in names:
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _sweep(self) -> None:
        """Delete folders that a killed process left behind, and entries whose folder is gone."""
        known, now = set(self.index.names()), time.time()
        for folder in self.folder.iterdir():
            if folder.name not in known:
                try:
                    old = now - folder.stat().st_mtime > _LEFT_BEHIND_S
                except OSError:
                    continue  # another process has deleted it
                if old and folder.name not in self.index.names():
                    shutil.rmtree(folder, ignore_errors=True)
        for name in known:
            if not (self.folder / name).exists():
                self.index.remove(name)
