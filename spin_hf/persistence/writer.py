"""`SpinCache.save_pretrained`: writes a cache's contents, in pieces, several shards at once.

stale summaries, pending clusters  ->  computed first, as the next step would do
contents of the cache              ->  `contents.py`
shards                             ->  taken in order by at most 8 threads;  then one rename (`files.py`)
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import MOST_BYTES, parse_bytes
from ..errors import OptionError, OptionTypeError, SavedCacheError
from ..indexing import cluster
from ..integration.layer_types import layers_with_contents
from ..state import CacheState
from . import files
from .checksum import piece_checksum
from .contents import Contents
from .fingerprint import ModelFacts
from .manifest import FILE_NAME, MOST_SEQUENCES
from .shards import Shard, cut
from .staging import Staging, thread_modes
from .strict_json import RefusedError

_MOST_THREADS = 8


class StoppedError(Exception):
    """The save was stopped by its caller, or because another thread failed."""


class ForkInUse(NamedTuple):
    """How to save a fork that nobody steps, in a thread of its own. There is nothing left to cluster or summarize in it.

    Attributes:
        kernels: waits for the kernels that write to it.
        is_dropped: whether to stop.
    """

    kernels: Callable[[], None]
    is_dropped: Callable[[], bool]


def save(
    directory: Any, state: CacheState, layers: list[Any], config: Any, model: ModelFacts | None, length: int,
    batch_size: int | None, tokens: Any, max_shard_bytes: int | str, fork: ForkInUse | None = None,
) -> None:  # fmt: skip
    """Write what a cache holds to a folder. A saved cache in it is replaced, in one step at the end.

    Args:
        directory: the folder; made if it does not exist.
        state, layers, config: of the cache; no forward is in progress.
        model: facts of the model; None if only the config is known.
        length, batch_size: what the cache holds.
        tokens: token ids [B, >= length], to be saved too; None for none.
        max_shard_bytes: tensor bytes of a file, as a cap on memory; "auto" for no limit.
        fork: for a fork that nobody steps, and a folder that exists. None for a cache in use: what is left is clustered, and
            its devices are waited for.
    Raises:
        OptionTypeError, OptionError: an argument, or the cache holds nothing that can be saved.
        SavedCacheError: a file could not be written. A saved cache that was there is as before.
        StoppedError: the fork was dropped. Likewise.
    """
    folder = files.folder_path(directory)
    if not length or not batch_size:
        raise OptionError(
            "save_pretrained: expected a cache that holds tokens, got none or states of linear attention only; call the model"
        )
    if batch_size > MOST_SEQUENCES:
        raise OptionError(
            f"save_pretrained: expected at most {MOST_SEQUENCES} sequences, got {batch_size}; use "
            "batch_select_indices on copies of the cache, and save each"
        )
    ids = _checked_tokens(tokens, batch_size, length)
    most = parse_bytes("max_shard_bytes", max_shard_bytes) or MOST_BYTES
    if fork is not None:
        fork.kernels()
    elif state.committed:
        cluster.cluster_new_tokens(state)
    source = Contents(state, layers_with_contents(layers), config, model, length, batch_size, ids, most)
    if fork is None:
        source.wait_for_kernels()
    try:
        new = fork is None and not folder.is_dir()
        if new:
            os.makedirs(folder, exist_ok=True)
            files.sync_folder(folder.absolute().parent)
        with files.locked(folder):
            _write(folder, source, _never if fork is None else fork.is_dropped)
    except RefusedError as error:
        raise OptionError(
            f"max_shard_bytes: expected {error.args[0]}, got {most} bytes for each; raise max_shard_bytes"
        ) from error
    except OSError as error:
        raise SavedCacheError(
            f"save_pretrained: expected to write a saved cache to {folder}, got {error}; make room, or use another folder"
        ) from error


def _checked_tokens(tokens: Any, batch_size: int, length: int) -> Tensor | None:
    if tokens is None:
        return None
    try:
        ids = torch.as_tensor(tokens).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionTypeError(f"tokens: expected token ids, got {type(tokens).__name__}; pass input_ids") from error
    ids = ids.unsqueeze(0) if ids.dim() == 1 else ids
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if not whole or ids.dim() != 2 or ids.shape[0] != batch_size or ids.shape[1] < length:
        raise OptionError(
            f"tokens: expected the ids of the tokens that the cache holds, [{batch_size}, {length}], got "
            f"{list(ids.shape)} of {ids.dtype}; pass the input_ids, and the new tokens behind them"
        )
    return ids[:, :length].long().contiguous()


def _never() -> bool:
    return False


def _write(folder: Path, source: Contents, is_dropped: Callable[[], bool]) -> None:
    """Write shards, then switch to them. On an error the new files are removed."""
    manifest = source.manifest
    shards = cut(manifest.specs(source.state.method, source.state.options), manifest.max_shard_bytes, manifest.save_id)
    try:
        manifest.shards[:] = _written(folder, shards, source, is_dropped)
        files.switch(folder, FILE_NAME, manifest.text())
    except BaseException:
        if not _is_current(folder, manifest.save_id):
            for shard in shards:
                with suppress(OSError):
                    os.unlink(folder / shard.name)
        raise
    files.remove_others(folder, [shard.name for shard in shards])


def _written(
    folder: Path, shards: list[Shard], source: Contents, is_dropped: Callable[[], bool]
) -> list[tuple[str, int, str]]:  # fmt: skip
    """Write shards by several threads. Returns name, size and digest of each. No thread runs behind an error.

    The threads are no pool of `concurrent.futures`, which takes no work while the interpreter exits.
    """
    failed: list[BaseException] = []
    """Errors, the first one first. Threads stop once there is one."""
    waiting, digests = deque(shards), dict[str, str]()

    def stops() -> bool:
        return bool(failed) or is_dropped()

    def write(shard: Shard) -> None:
        digest, staging = hashlib.sha256(shard.header), Staging()
        with thread_modes():
            try:
                files.create(folder / shard.name, partial(_fill, shard, source, staging, digest, stops))
            finally:
                staging.wait()
        digests[shard.name] = digest.hexdigest()

    def write_some() -> None:
        with suppress(IndexError):
            while not failed:
                shard = waiting.popleft()
                try:
                    write(shard)
                except BaseException as error:
                    failed.append(error)

    threads: list[Thread] = []
    try:
        for number in range(min(_MOST_THREADS, os.cpu_count() or 1, len(shards))):
            thread = Thread(target=write_some, name=f"spin_hf_save_{number}", daemon=True)
            thread.start()
            threads.append(thread)
    except RuntimeError:  # no more threads; while the interpreter exits, none
        if not threads:
            write_some()
    except BaseException as error:
        failed.append(error)
    try:
        _join(threads)
    except BaseException as error:
        failed.append(error)
        _join(threads)
    if failed:
        try:
            raise failed[0]
        finally:
            failed.clear()  # errors hold this frame, and so the contents, until the garbage collector comes
    return [(shard.name, shard.num_bytes, digests[shard.name]) for shard in shards]


def _join(threads: list[Thread]) -> None:
    for thread in threads:
        thread.join()


def _is_current(folder: Path, save_id: str) -> bool:
    """Whether the folder's JSON names the shards of this save: an error may arrive after the switch."""
    try:
        return save_id in (folder / FILE_NAME).read_text("utf-8")
    except FileNotFoundError:
        return False
    except (OSError, UnicodeDecodeError):
        return True  # unknown: shards without a manifest are harmless, a manifest without its shards is not


def _fill(
    shard: Shard, source: Contents, staging: Staging, digest: Any, stops: Callable[[], bool], descriptor: int
) -> None:
    """Write a shard, and add the checksums of its pieces to `digest`. Raises StoppedError once `stops()`."""
    files.write_all(descriptor, shard.header)
    for part in shard.parts:
        for views, (begin, end) in zip(source.pieces(part, staging), part.pieces(), strict=True):
            if stops():
                raise StoppedError
            assert sum(view.nbytes for view in views) == end - begin
            digest.update(piece_checksum(views))
            for view in views:
                files.write_all(descriptor, view)
