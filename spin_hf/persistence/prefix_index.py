"""Index of stored prefixes: which entry shares the most tokens with a prompt, and which one was used last.

    tokens    [ block 0 ][ block 1 ][ block 2 ][ rest ]          `block_tokens` each
    hashes    h0 = H(space, block 0)   h1 = H(h0, block 1)   h2 = H(h1, block 2)

    entries   name | space | tokens | bytes | last use           one row per entry
    blocks    hash | entry                                       one row per block of an entry

A hash stands for all tokens up to its block, so an entry that has a prompt's k-th hash has all earlier ones too. The longest
match is therefore found by bisection. `space` keeps models, methods and dtypes apart.

The index is one SQLite file, or lives in memory. SQLite makes every change whole or not at all, lets several processes use the
file at once, and holds no lock of a process that was killed.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_BUSY_S = 30.0
"""Seconds to wait for another process's change."""
_MOST_FORK_S = 10.0
"""Seconds that `os.fork` waits at most for a change of another thread."""
_HASH_BYTES = 16
_FORMAT = 1
"""Version of the tables; stored as SQLite's user_version."""

_TABLES = """
CREATE TABLE IF NOT EXISTS entries (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, space TEXT NOT NULL, num_tokens INTEGER NOT NULL,
    num_bytes INTEGER NOT NULL, used REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS blocks (hash BLOB NOT NULL, entry INTEGER NOT NULL, PRIMARY KEY (hash, entry)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_entry ON blocks (entry);
"""


class IndexFormatError(Exception):
    """The file is no index, or one of another version."""


@dataclass(frozen=True)
class Match:
    """An entry that shares whole blocks with a prompt.

    Attributes:
        name: of the entry.
        num_tokens: tokens of the entry.
        shared: tokens in common, in whole blocks. More may follow.
    """

    name: str
    num_tokens: int
    shared: int


class PrefixIndex:
    """The entries of one store.

    Args:
        file: the SQLite file; None for an index in memory.
        block_tokens: tokens of a block.
    Raises:
        IndexFormatError: `file` is something else.
    """

    def __init__(self, file: Path | None, block_tokens: int = 256) -> None:
        self.file, self.block_tokens = file, block_tokens
        self._lock = threading.RLock()
        self._hashed: tuple[str, bytes, list[bytes]] = "", b"", []
        """Space, tokens and hashes of the last prompt: a prompt that is looked up is often inserted next."""
        self._connection = self._connected()
        try:
            self._prepare()
            self._inode = None if file is None else _inode_of(file)
        except BaseException as error:
            self._connection.close()
            if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
                raise IndexFormatError(
                    f"{file}: expected an index of prefixes, got a file that SQLite cannot read"
                ) from error
            raise

    def _connected(self) -> sqlite3.Connection:
        place = ":memory:" if self.file is None else self.file
        return sqlite3.connect(place, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)

    def before_fork(self) -> Callable[[bool], None]:
        """Called before the process forks; see `process_forks.py`.

        SQLite's connections to files must not cross a fork: a child would share what SQLite notes about locks. So this one is
        closed, and opened again on both sides. While another thread uses it for long, it is left open; the child never closes
        it then. No thread is inside SQLite when the process forks, as it would hold locks.
        """
        held = self._lock.acquire(timeout=_MOST_FORK_S)
        if held and self.file is not None:
            with suppress(sqlite3.Error):
                self._connection.close()

        def after(in_child: bool) -> None:
            if in_child and not held:
                self._lock, self._inherited = threading.RLock(), self._connection
            try:
                if self.file is not None and (held or in_child):
                    self._reopen()
            finally:
                if held:
                    self._lock.release()

        return after

    def _reopen(self) -> None:
        """Open the file again. If that fails, every later use raises sqlite3.Error."""
        with suppress(sqlite3.Error):
            self._connection = self._connected()
            self._connection.execute("PRAGMA synchronous=NORMAL")

    def _prepare(self) -> None:
        if self.file is not None:
            self._log_ahead()
            self._connection.execute("PRAGMA synchronous=NORMAL")
        with _change(self):
            version = self._connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, _FORMAT):
                raise IndexFormatError(f"{self.file}: expected an index of version {_FORMAT}, got version {version}")
            for statement in _TABLES.split(";"):
                self._connection.execute(statement)
            self._connection.execute(f"PRAGMA user_version={_FORMAT}")

    def _log_ahead(self) -> None:
        """Turn the file to write-ahead logging. SQLite raises at once if another connection does so too, instead of waiting."""
        until = time.monotonic() + _BUSY_S
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > until:
                    raise
            time.sleep(0.01)

    def is_in_place(self) -> bool:
        """Whether the file is still at its path: SQLite goes on with one that was removed."""
        try:
            return self.file is None or _inode_of(self.file) == self._inode
        except OSError:
            return False

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def find(self, space: str, ids: Sequence[int], most: int = 4) -> list[Match]:
        """The entries that share the most whole blocks with a prompt, the last used first; empty if none shares one.

        Args:
            ids: the prompt's tokens.
            most: entries to return at most.
        """
        hashes = self.hashes(space, ids)
        with self._lock, closing(self._connection.cursor()) as cursor:
            low, high = 0, len(hashes)
            while low < high:
                middle = (low + high + 1) // 2
                found = cursor.execute("SELECT 1 FROM blocks WHERE hash = ? LIMIT 1", (hashes[middle - 1],)).fetchone()
                low, high = (middle, high) if found else (low, middle - 1)
            if not low:
                return []
            rows = cursor.execute(
                "SELECT name, num_tokens FROM entries JOIN blocks ON entries.id = blocks.entry WHERE hash = ? "
                "ORDER BY used DESC, entries.id DESC LIMIT ?",
                (hashes[low - 1], most),
            ).fetchall()
        return [Match(name, num_tokens, low * self.block_tokens) for name, num_tokens in rows]

    def insert(
        self, name: str, space: str, ids: Sequence[int], num_bytes: int, unless: Callable[[], bool] = lambda: False
    ) -> bool:  # fmt: skip
        """Add an entry, or replace the one of this name. Returns whether it was added.

        Args:
            unless: called when no process can change the index; it may look up entries. True adds none.
        """
        hashes = self.hashes(space, ids)
        with _change(self) as connection:
            if unless():
                return False
            self._delete(name)
            entry = connection.execute(
                "INSERT INTO entries (name, space, num_tokens, num_bytes, used) VALUES (?, ?, ?, ?, ?)",
                (name, space, len(ids), num_bytes, time.time()),
            ).lastrowid
            connection.executemany("INSERT INTO blocks VALUES (?, ?)", [(each, entry) for each in hashes])
        return True

    def changing(self) -> AbstractContextManager[object]:
        """Within this context all changes of this thread are one: whole or not at all."""
        return _change(self)

    def touch(self, name: str) -> None:
        """Note that an entry was used."""
        with _change(self) as connection:
            connection.execute("UPDATE entries SET used = ? WHERE name = ?", (time.time(), name))

    def remove(self, name: str) -> bool:
        """Remove an entry. Returns whether it was there: of several processes one removes it."""
        with _change(self):
            return self._delete(name)

    def remove_beyond(self, max_bytes: int, keep: str | None = None) -> list[str]:
        """Remove the least recently used entries until the others take at most `max_bytes`. Returns their names.

        Args:
            keep: an entry that is removed last.
        """
        removed = []
        with _change(self) as connection:
            total = self.num_bytes
            rows = connection.execute(
                "SELECT name, num_bytes FROM entries ORDER BY name IS ?, used, id", (keep,)
            ).fetchall()
            for name, num_bytes in rows:
                if total <= max_bytes:
                    break
                self._delete(name)
                removed.append(name)
                total -= num_bytes
        return removed

    def names(self) -> list[str]:
        """The names of all entries, the least recently used first."""
        with self._lock:
            return [name for (name,) in self._connection.execute("SELECT name FROM entries ORDER BY used, id")]

    @property
    def num_bytes(self) -> int:
        """Bytes of all entries."""
        with self._lock:
            return int(self._connection.execute("SELECT COALESCE(SUM(num_bytes), 0) FROM entries").fetchone()[0])

    def hashes(self, space: str, ids: Sequence[int]) -> list[bytes]:
        """The hash of each whole block of `ids`, with all tokens before it."""
        tokens, width = (
            (ids if isinstance(ids, array) and ids.typecode == "q" else array("q", ids)).tobytes(),
            8 * self.block_tokens,
        )
        known = self._hashed
        if known[:2] == (space, tokens):
            return known[2]
        made, last = [], _hash(f"{self.block_tokens}\0{space}".encode())
        for first in range(0, len(tokens) - width + 1, width):
            last = _hash(last + tokens[first : first + width])
            made.append(last)
        self._hashed = space, tokens, made
        return made

    def _delete(self, name: str) -> bool:
        found = self._connection.execute("SELECT id FROM entries WHERE name = ?", (name,)).fetchone()
        if found is None:
            return False
        self._connection.execute("DELETE FROM blocks WHERE entry = ?", found)
        self._connection.execute("DELETE FROM entries WHERE id = ?", found)
        return True


def _inode_of(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_dev, found.st_ino


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_HASH_BYTES).digest()


@contextmanager
def _change(index: PrefixIndex) -> Iterator[sqlite3.Connection]:
    """A change of the tables, whole or not at all, also if Ctrl-C comes within. Within another one it is a part of that."""
    with index._lock:
        connection = index._connection
        is_part = connection.in_transaction
        if is_part:
            yield connection
            return
        try:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
