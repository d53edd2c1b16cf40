"""A cache of a tensor-parallel model in files: a saved cache for each rank, and a JSON that names them.

    <directory>/spin_cache_ranks.json           how many ranks, and the folder of the newest save
    <directory>/ranks-<id>/rank-00000-of-00002/ what rank 0 held, as `save_pretrained` writes it for a model on one rank
                           rank-00001-of-00002/

One rename of the JSON, when all ranks have written, switches from the old save to the new one.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from ..config import shown
from ..errors import SavedCacheError
from ..integration.rank_agreement import Ranks, meeting
from . import files
from .manifest import FILE_NAME
from .strict_json import Fields, RefusedError, parse

RANKS_FILE = "spin_cache_ranks.json"
_FORMAT = "spin_hf saved cache of ranks"
_VERSION = 1
_MOST_RANKS = 4096
_MOST_FILE_BYTES = 4096
_OURS = re.compile(r"ranks-[0-9a-f]{12}")


def save_ranks(directory: Any, ranks: Ranks | None, write: Callable[[Any], None]) -> None:
    """Save a cache, one folder for each rank. All ranks see the same directory.

    Args:
        directory: the folder. A saved cache in it is replaced.
        ranks: None for a model on one rank, which saves to the directory itself.
        write: saves what this rank holds to a folder.
    Raises:
        As `write`, on all ranks. A saved cache that was there is as before.
    """
    folder = files.folder_path(directory)
    if ranks is None:
        write(directory)
        _remove(folder, None)
        return
    name = f"ranks-{ranks.gathered('name a saved cache', secrets.token_hex(6))[0]}"
    own = folder / name / _part(ranks.number, ranks.size)
    try:
        with meeting(ranks, "save a cache"):
            write(own)
        with meeting(ranks, "switch to a saved cache"):
            if not ranks.number:
                _switch(folder, name, ranks.size)
    except BaseException:
        shutil.rmtree(own, ignore_errors=True)
        with suppress(OSError):
            (folder / name).rmdir()
        raise


def _switch(folder: Path, name: str, size: int) -> None:
    content = {"format": _FORMAT, "version": _VERSION, "ranks": size, "folder": name}
    try:
        files.switch(folder, RANKS_FILE, json.dumps(content, indent=1).encode())
    except OSError as error:
        raise SavedCacheError(
            f"save_pretrained: expected to write {RANKS_FILE} to {folder}, got {error}; make room, or use another folder"
        ) from error
    _remove(folder, name)


def _remove(folder: Path, name: str | None) -> None:
    """Remove other saves than that of the ranks' folder `name`; None for that of one rank."""
    own = folder / RANKS_FILE if name is None else folder / FILE_NAME
    with suppress(OSError):
        own.unlink()
    if name is not None:
        files.remove_others(folder, [])
    with suppress(OSError):  # the new save is complete
        for entry in os.listdir(folder):
            if _OURS.fullmatch(entry) and entry != name:
                shutil.rmtree(folder / entry, ignore_errors=True)


def saved_parts(directory: Any) -> list[Path]:
    """The folder of each rank of a saved cache; the directory itself if one rank has saved it.

    Raises:
        OptionTypeError: `directory` is no path.
        SavedCacheError: the JSON is damaged.
    """
    folder = files.folder_path(directory)
    try:
        with closing(files.OpenFile(folder / RANKS_FILE, RANKS_FILE)) as file:
            if file.size > _MOST_FILE_BYTES:
                raise RefusedError(f"{RANKS_FILE} of at most {_MOST_FILE_BYTES} bytes", f"{file.size} bytes")
            text = bytearray(file.size)
            file.read_into([memoryview(text)], 0)
        fields = Fields(parse(bytes(text)), RANKS_FILE)
        if (fields.text("format"), fields.count("version", 1 << 30)) != (_FORMAT, _VERSION):
            raise RefusedError(f"{_FORMAT!r} of version {_VERSION}", "another one")
        size, name = fields.count("ranks", _MOST_RANKS, 1), fields.text("folder")
        fields.done()
        if not _OURS.fullmatch(name):
            raise RefusedError(f"the name of a folder in {RANKS_FILE}", shown(name, 80))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the reader says what is wrong with such a folder
        return [folder]
    except (RefusedError, OSError) as error:
        expected, got = error.args[:2] if isinstance(error, RefusedError) else ("a file", error)
        raise SavedCacheError(
            f"saved cache: expected {expected}, got {got} in {shown(str(folder))}; save the cache again"
        ) from error
    return [folder / name / _part(number, size) for number in range(size)]


def _part(number: int, size: int) -> str:
    return f"rank-{number:05d}-of-{size:05d}"
