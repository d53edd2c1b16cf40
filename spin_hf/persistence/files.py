"""Files of a saved cache: written so that a crash leaves the old or the new, read without following links.

    save   lock the folder | write new shards, fsync | write spin_cache.json.tmp, fsync | rename it | remove the old shards
    load   open the JSON and all shards by descriptor | compare sizes | read into given memory

The shards of every save have names of their own. One rename of the JSON switches from the old ones to the new ones. So there is
no moment without a valid saved cache, and nothing to recover after a crash. The next save removes shards that no JSON names.
Files are read, not mapped: a file that is truncated meanwhile gives an error instead of SIGBUS.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any

from ..errors import OptionTypeError
from .strict_json import RefusedError

_OURS = re.compile(r"pages-[0-9a-f]{12}-\d{5}-of-\d{5}\.safetensors|spin_cache\.json\.tmp")
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)
"""Without this flag, opening a pipe blocks until another process writes to it."""


def folder_path(directory: Any) -> Path:
    """The argument `directory` as a path. Raises OptionTypeError."""
    if not isinstance(directory, (str, os.PathLike)):
        raise OptionTypeError(f"directory: expected a path, got {type(directory).__name__}; pass the path of a folder")
    return Path(directory)


def write_all(descriptor: int, content: Any) -> None:
    """Write all bytes of a buffer."""
    view = memoryview(content).cast("B")
    while len(view):
        view = view[os.write(descriptor, view) :]


def create(path: Path, write: Callable[[int], None]) -> None:
    """Create a file, let `write` fill it through its descriptor, and flush it to the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK, 0o666)
    try:
        write(descriptor)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Flush the names in a folder to the disk, on systems that can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that two savers do not remove each other's files. The system drops it with the process."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems lock no folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def switch(folder: Path, name: str, content: bytes) -> None:
    """Replace the content of the file `name` atomically."""
    temporary = folder / f"{name}.tmp"
    with suppress(FileNotFoundError):
        os.unlink(temporary)
    try:
        create(temporary, lambda descriptor: write_all(descriptor, content))
        sync_folder(folder)  # the shards that the content names
        os.replace(temporary, folder / name)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(folder)


def remove_others(folder: Path, names: Sequence[str]) -> None:
    """Remove the shards of other saves; `names` stay. Files of other kinds stay too."""
    for entry in os.listdir(folder):
        if _OURS.fullmatch(entry) and entry not in names:
            with suppress(OSError):
                os.unlink(folder / entry)


_MOST_VIEWS = 256
"""Most views that one call to the system fills."""


class OpenFile:
    """A file, open for reading. Regular, no link, of a known size.

    Args:
        path: where it is.
        name: for messages.
    Raises:
        RefusedError: it is a link, or no regular file.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.name, self._lock = name, Lock()
        if path.is_symlink():
            raise RefusedError(f"{name} to be no link", "a link")
        self.descriptor = os.open(path, os.O_RDONLY | _NO_LINK | _NO_WAIT)
        found = os.fstat(self.descriptor)
        self.size = found.st_size
        if not stat.S_ISREG(found.st_mode):
            self.close()
            raise RefusedError(f"{name} to be a regular file", "another kind")

    def read_into(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill memory with the bytes from `offset` on. Several threads may call this.

        Raises:
            RefusedError: the file ends earlier.
        """
        left = [view.cast("B") for view in views if view.nbytes]
        while left:
            count = self._read(left[:_MOST_VIEWS], offset)
            if not count:
                raise RefusedError(f"{self.name} to be whole while it is read", "fewer bytes (was it cut?)")
            offset += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if count:
                left[0] = left[0][count:]

    def _read(self, views: list[memoryview], offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self.descriptor, views, offset)
        view = views[0]
        if hasattr(os, "pread"):  # macOS
            content = os.pread(self.descriptor, len(view), offset)
            view[: len(content)] = content
            return len(content)
        # Windows: all threads share the position of the descriptor.
        with self._lock, open(self.descriptor, "rb", closefd=False, buffering=0) as file:
            file.seek(offset)
            return file.readinto(view) or 0

    def close(self) -> None:
        """Close it."""
        os.close(self.descriptor)
