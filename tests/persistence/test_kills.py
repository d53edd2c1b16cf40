"""A process that dies while it saves leaves the old saved cache or the new one, and the next save removes what it left behind.

A death at a system call is played by an error from it and from every later one, so that no clean-up runs. A slow test kills
real processes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from spin_hf import SavedCacheError, SpinCache
from spin_hf.persistence import shards
from tests.support.saved_caches import JSON, prefilled, read, shards_of
from tests.support.zoo import random_tokens, subject_model

CALLS = ("open", "write", "fsync", "replace", "unlink", "makedirs", "listdir")
MAX_SHARD = 30_000
QUICK_KILLS = 24
"""Kills of the quick run, spread evenly."""


class KilledError(BaseException):
    """The process is dead."""


@contextmanager
def dying(monkeypatch: pytest.MonkeyPatch, at: int, *, error: BaseException | None = None) -> Iterator[list[int]]:
    """System calls from number `at` on fail: all of them, or only that one with `error`. Yields the number of calls.

    Calls of this thread count, and those of threads that save.
    """
    count, me, lock = [0], threading.get_ident(), threading.Lock()

    def wrapped(name: str, call: Any) -> Any:
        def inner(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != me and not threading.current_thread().name.startswith("spin_hf_save"):
                return call(*args, **kwargs)
            with lock:
                count[0] += 1
                number = count[0]
            if error is None and number > at:
                raise KilledError
            if error is not None and number == at + 1:
                raise error
            if name == "write" and len(args[1]) > 3000:  # a large write is several calls, any of which may be the last
                return call(args[0], args[1][:3000])
            return call(*args, **kwargs)

        return inner

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, wrapped(name, getattr(os, name)))
        yield count


def caches() -> tuple[Any, Any]:
    """Two caches of one model with different tokens."""
    return prefilled("llama", method="shadowkv", steps=0), prefilled("llama", method="shadowkv", tokens=90, steps=0)


@pytest.fixture(scope="module")
def old_and_new() -> tuple[Any, Any]:
    return caches()


@pytest.fixture(scope="module")
def number_of_calls(old_and_new: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> int:
    folder, patch = tmp_path_factory.mktemp("counted"), pytest.MonkeyPatch()
    old_and_new[0].save_pretrained(folder, max_shard_bytes=MAX_SHARD)
    with dying(patch, 1 << 30) as count:
        old_and_new[1].save_pretrained(folder, max_shard_bytes=MAX_SHARD)
    return count[0]


def check_old_or_new(folder: Path, old: Any, new: Any) -> str:
    """The saved cache is one of both, whole. Returns which; "none" if there is none."""
    if old is None and not (folder / JSON).exists():
        with pytest.raises(SavedCacheError, match="expected a folder that SpinCache"):
            SpinCache.from_pretrained(folder, subject_model("llama"))
        return "none"
    found = SpinCache.from_pretrained(folder, subject_model("llama"))
    for name, cache in (("old", old), ("new", new)):
        if cache is not None and found.get_seq_length() == cache.get_seq_length():
            for ours, theirs in zip(found.layers, cache.layers, strict=True):
                assert torch.equal(ours.keys, theirs.keys)
                assert torch.equal(ours.values, theirs.values)
            return name
    raise AssertionError(f"{found.get_seq_length()} tokens")


def strays(folder: Path) -> set[str]:
    """Files that the JSON does not name."""
    return {file.name for file in folder.iterdir()} - {JSON} - {file.name for file in shards_of(folder)}


def killed_at(point: int, folder: Path, monkeypatch: pytest.MonkeyPatch, old: Any, new: Any) -> str:
    """Save `new` over `old` (None: over nothing), die at call `point`, check. Returns what is there."""
    if old is not None:
        old.save_pretrained(folder, max_shard_bytes=MAX_SHARD)
    with dying(monkeypatch, point), pytest.raises(KilledError):
        new.save_pretrained(folder, max_shard_bytes=MAX_SHARD)
    found = check_old_or_new(folder, old, new)
    new.save_pretrained(folder, max_shard_bytes=MAX_SHARD)
    assert not strays(folder)
    assert check_old_or_new(folder, None, new) == "new"
    return found


@pytest.mark.parametrize("over", ["nothing", "another"])
def test_some_kills(
    over: str, old_and_new: tuple[Any, Any], number_of_calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quick run: some points, the last ones among them, where the switch is."""
    old, new = old_and_new
    last = range(number_of_calls - 16, number_of_calls)
    points = {*range(0, number_of_calls, number_of_calls // (QUICK_KILLS - 16)), *last}
    found = set()
    for point in sorted(points):
        try:
            found.add(
                killed_at(point, tmp_path / f"{over} {point}", monkeypatch, old if over == "another" else None, new)
            )
        except pytest.fail.Exception:
            assert over == "nothing", point  # fewer calls where nothing is removed
            assert point > number_of_calls - 16
    assert found == {"old" if over == "another" else "none", "new"}


@pytest.mark.slow
@pytest.mark.parametrize("over", ["nothing", "another"])
def test_a_kill_at_every_call(
    over: str, old_and_new: tuple[Any, Any], number_of_calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = old_and_new
    found: list[str] = []
    try:
        for point in range(number_of_calls):
            found.append(killed_at(point, tmp_path / str(point), monkeypatch, old if over == "another" else None, new))
    except pytest.fail.Exception:
        assert over == "nothing", len(found)
        assert len(found) > number_of_calls - 16
    first = found.index("new")
    assert set(found[:first]) == {"old" if over == "another" else "none"}
    assert set(found[first:]) == {"new"}
    assert len(found) > 100


def test_a_full_disk(
    old_and_new: tuple[Any, Any], number_of_calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of one call: the old saved cache is there, without any file of the new one, or the new one is."""
    old, new = old_and_new
    refused = 0
    for point in sorted({*range(1, number_of_calls, 5), *range(number_of_calls - 16, number_of_calls)}):
        old.save_pretrained(tmp_path, max_shard_bytes=MAX_SHARD)
        try:
            with dying(monkeypatch, point, error=OSError(28, "No space left on device")):
                new.save_pretrained(tmp_path, max_shard_bytes=MAX_SHARD)
        except SavedCacheError as error:
            assert "make room" in str(error)
            refused += 1
            if check_old_or_new(tmp_path, old, new) == "old":
                assert not strays(tmp_path)
        else:
            assert check_old_or_new(tmp_path, old, new) == "new"
    assert refused > number_of_calls // 10


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=["interrupt", "memory"])
def test_an_interruption_leaves_no_files(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = caches()
    old.save_pretrained(tmp_path, max_shard_bytes=MAX_SHARD)
    with dying(monkeypatch, 8, error=error), pytest.raises(type(error)):
        new.save_pretrained(tmp_path, max_shard_bytes=MAX_SHARD)
    assert check_old_or_new(tmp_path, old, new) == "old"
    assert not strays(tmp_path)


def test_files_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pages-mine.safetensors").write_text("mine")
    for cache in caches():
        cache.save_pretrained(tmp_path)
    assert strays(tmp_path) == {"config.json", "pages-mine.safetensors"}


_SAVER = """
import os, signal, sys, time
from tests.support.saved_caches import prefilled
cache = prefilled("llama", method="shadowkv", tokens=90, steps=0)
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if not child:
        cache.save_pretrained(sys.argv[1], max_shard_bytes=3000)
        os._exit(0)
    time.sleep(float(line))
    os.kill(child, signal.SIGKILL)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.slow
def test_killed_processes(old_and_new: tuple[Any, Any], tmp_path: Path) -> None:
    """SIGKILL some milliseconds after a save has begun. Nothing stays locked."""
    old, new = old_and_new
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _SAVER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    found, killed = set(), 0
    for number in range(60):
        old.save_pretrained(tmp_path)
        process.stdin.write(f"{0.0005 * number}\n")
        process.stdin.flush()
        killed += int(process.stdout.readline()) == signal.SIGKILL
        found.add(check_old_or_new(tmp_path, old, new))
        old.save_pretrained(tmp_path)
        assert not strays(tmp_path)
    process.stdin.close()
    process.wait()
    assert killed > 20
    assert "old" in found


def test_savers_and_readers_at_once(old_and_new: tuple[Any, Any], tmp_path: Path) -> None:
    """Two savers and a reader of one folder: every read gives one of both caches, whole."""
    old, new = old_and_new
    old.save_pretrained(tmp_path, max_shard_bytes=3000)
    done, errors = threading.Event(), list[BaseException]()

    def saver(cache: Any) -> None:
        try:
            while not done.is_set():
                cache.save_pretrained(tmp_path, max_shard_bytes=3000)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=saver, args=(cache,)) for cache in old_and_new]
    for thread in threads:
        thread.start()
    try:
        found = [check_old_or_new(tmp_path, old, new) for _ in range(20)]
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not errors
    assert len(found) == 20
    assert not strays(tmp_path)


def test_pieces_are_the_format() -> None:
    """Digests depend on the size of a piece, so it cannot change within a version of the format."""
    assert shards.PIECE_BYTES == 4 << 20


def test_reading_does_not_need_the_old_tokens(tmp_path: Path) -> None:
    """After a replacement only the new tokens are there."""
    old, new = caches()
    old.save_pretrained(tmp_path, random_tokens(2, 70))
    new.save_pretrained(tmp_path)
    restored = SpinCache.from_pretrained(tmp_path, subject_model("llama"))
    assert torch.equal(
        read(subject_model("llama"), restored, random_tokens(2, 1)),
        read(subject_model("llama"), new, random_tokens(2, 1)),
    )
