"""Threads that save a cache: the files are the same with any number of them, and an error leaves no thread and no file."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from spin_hf import SavedCacheError, SpinCache
from spin_hf.persistence import writer
from spin_hf.persistence.contents import Contents
from tests.support.late_copies import copies_are_late
from tests.support.saved_caches import assert_goes_on, prefilled, read_json, shards_of
from tests.support.zoo import subject_model

MAX_SHARD = 30_000


def saving() -> list[str]:
    """Threads that save."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("spin_hf_save")]


def bodies(folder: Path) -> list[bytes]:
    """The tensors of each shard: headers have the id of their save."""
    found = []
    for shard in shards_of(folder):
        raw = shard.read_bytes()
        found.append(raw[8 + int.from_bytes(raw[:8], "little") :])
    return found


@pytest.fixture(scope="module")
def cache() -> SpinCache:
    """Padded sequences, whose last pages are partly filled, and two that share segments."""
    made = prefilled("llama", method="retroinfer", padded=True, tokens=150)
    made.batch_select_indices(torch.tensor([0, 1, 1]))
    return made


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("max_shard_bytes", [MAX_SHARD, 1 << 30])
def test_the_files_are_the_same(
    threads: int, max_shard_bytes: int, cache: SpinCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if all pages pass through buffers, as those on a GPU do."""
    for name in ("plain", "through buffers"):
        with monkeypatch.context() as patch:
            patch.setattr(writer, "_MOST_THREADS", threads if name != "plain" else 1)
            patch.setattr(os, "cpu_count", lambda: 8)
            late = copies_are_late(patch) if name != "plain" else []
            cache.save_pretrained(tmp_path / name, max_shard_bytes=max_shard_bytes)
            assert name == "plain" or sum(stream.copies for stream in late) > 4
            assert not any(stream.waiting for stream in late)
    assert not saving()
    plain, others = bodies(tmp_path / "plain"), bodies(tmp_path / "through buffers")
    assert plain == others
    assert (len(plain) > 4) == (max_shard_bytes == MAX_SHARD)
    assert_goes_on(subject_model("llama"), cache, SpinCache.from_pretrained(tmp_path / "plain", subject_model("llama")))


def test_places_without_a_token_are_zero(tmp_path: Path) -> None:
    """Memory behind the last token, here of a longer prompt, gets into no file."""
    cache = prefilled("llama", method="shadowkv", tokens=150, steps=0)
    cache.crop(-77)
    cache.save_pretrained(tmp_path)
    pages = cache.paged_layers[0].store
    assert pages is not None
    held = {word for body in bodies(tmp_path) for word in torch.frombuffer(bytearray(body), dtype=torch.int32).tolist()}
    dropped = torch.cat([chunk.flatten() for chunk in pages.backing.chunks]).view(torch.int32)
    kept = pages.held(73)
    alive = {word for states in kept for word in states.contiguous().view(torch.int32).flatten().tolist()}
    gone = set(dropped.tolist()) - alive - {0}
    assert len(gone) > 1000, "the memory held other tokens before"
    assert len(gone & held) < 10, "by chance a number is there twice"


def test_the_first_error_is_raised(cache: SpinCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = os.write, [0]

    def failing(descriptor: int, content: Any) -> int:
        if threading.current_thread().name.startswith("spin_hf_save"):
            written[0] += 1
            if written[0] == 9:
                raise OSError(28, "No space left on device")
        return write(descriptor, content)

    monkeypatch.setattr(os, "write", failing)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    with pytest.raises(SavedCacheError, match="No space left"):
        cache.save_pretrained(tmp_path, max_shard_bytes=MAX_SHARD)
    assert written[0] >= 9
    assert not list(tmp_path.iterdir())
    assert not saving()


def test_an_interrupt_waits_for_threads(cache: SpinCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C arrives in the thread that waits for the others."""
    begun, pieces = threading.Event(), Contents.pieces

    def noted(self: Contents, *args: Any) -> Any:
        begun.set()
        return pieces(self, *args)

    join, joined = writer._join, list[int]()

    def interrupted(threads: list[threading.Thread]) -> None:
        assert begun.wait(30)
        joined.append(len(threads))
        if len(joined) == 1:
            raise KeyboardInterrupt
        join(threads)

    monkeypatch.setattr(Contents, "pieces", noted)
    monkeypatch.setattr(writer, "_join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.save_pretrained(tmp_path, max_shard_bytes=MAX_SHARD)
    assert not list(tmp_path.iterdir())
    assert not saving()


def test_saving_in_inference_mode(cache: SpinCache, tmp_path: Path) -> None:
    with torch.inference_mode():
        cache.save_pretrained(tmp_path, max_shard_bytes=MAX_SHARD)
    assert len(read_json(tmp_path)["shards"]) > 4
