"""Threads that load a saved cache: what is copied is right, reading begins early, and an error leaves no thread and no copy."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spin_hf import SavedCacheError, SpinCache
from spin_hf.persistence import opened
from spin_hf.persistence.checksum import piece_checksum
from spin_hf.persistence.manifest import OtherLayer, PagedLayer
from spin_hf.persistence.piece_reader import PieceReader
from spin_hf.persistence.reader import later_layers_alike
from spin_hf.persistence.staging import Staging
from spin_hf.storage.page_store import PageStore
from tests.support.late_copies import LateStream, copies_are_late
from tests.support.memory import with_tight_gpu_memory
from tests.support.saved_caches import assert_goes_on, prefilled
from tests.support.zoo import subject_model

CPU = torch.device("cpu")


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[LateStream]:
    """All pages go through buffers and streams that copy late. Pieces are small."""
    return copies_are_late(monkeypatch)


def loading() -> list[str]:
    """Threads that load."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("spin_hf_load")]


@pytest.mark.parametrize("method", ["shadowkv", "retroinfer", "fitted"])
@pytest.mark.parametrize("threads", [1, 3])
def test_pages_go_through_buffers(
    threads: int, method: str, late: list[LateStream], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opened, "_MOST_THREADS", threads)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    cache = prefilled("llama", method=method, tokens=150)
    cache.save_pretrained(tmp_path)
    restored = SpinCache.from_pretrained(tmp_path, subject_model("llama"))
    assert sum(stream.copies for stream in late) > 8
    assert not any(stream.waiting for stream in late)
    assert not loading()
    assert_goes_on(subject_model("llama"), cache, restored)


def test_pages_of_another_layout_go_through_buffers(late: list[LateStream], tmp_path: Path) -> None:
    cache = with_tight_gpu_memory(lambda cap: prefilled("llama", cpu_dtype="int8", gpu_memory=cap, tokens=150))
    assert cache.paged_layers[0].store.backing.converted
    cache.save_pretrained(tmp_path)
    restored = SpinCache.from_pretrained(tmp_path, subject_model("llama"), gpu_memory="auto")
    for ours, theirs in zip(restored.layers, cache.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)


def test_pages_on_a_gpu_are_checked_there(
    late: list[LateStream], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the host nor a thread that reads computes their checksums, and damage of any of them is found."""
    cache = prefilled("llama", method="retroinfer", tokens=150)
    cache.save_pretrained(tmp_path)
    on_host = list[int]()

    def noted(buffers: list[memoryview]) -> bytes:
        on_host.append(sum(buffer.nbytes for buffer in buffers))
        return piece_checksum(buffers)

    monkeypatch.setattr(opened, "piece_checksum", noted)
    SpinCache.from_pretrained(tmp_path, subject_model("llama"))
    (file,) = tmp_path.glob("*.safetensors")
    header = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    sizes = {name: about["data_offsets"] for name, about in header.items() if name != "__metadata__"}
    assert sum(on_host) == sum(end - begin for name, (begin, end) in sizes.items() if not name.startswith("layers."))
    whole = file.read_bytes()
    first = len(whole) - max(end for _, end in sizes.values())
    of_pages = [span for name, span in sizes.items() if name.startswith("layers.")]
    for begin, end in of_pages:
        for at in (begin, end - 1):
            damaged = bytearray(whole)
            damaged[first + at] ^= 1
            file.write_bytes(damaged)
            with pytest.raises(SavedCacheError, match="was it altered"):
                SpinCache.from_pretrained(tmp_path, subject_model("llama"))
    file.write_bytes(whole)
    assert_goes_on(subject_model("llama"), cache, SpinCache.from_pretrained(tmp_path, subject_model("llama")))


def test_a_buffer_is_free_before_it_is_filled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    copies_are_late(monkeypatch)
    held, places = Staging(), [torch.zeros(6, dtype=torch.uint8) for _ in range(9)]
    addresses = set()
    for number, place in enumerate(places):
        buffer = held.buffer(6, CPU)
        addresses.add(buffer.data_ptr())
        buffer.fill_(number)
        held.copy(buffer.view(3, 2), [place.view(3, 2)[:1], place.view(3, 2)[1:]], CPU)
    assert [int(place[0]) for place in places[-2:]] == [0, 0], "the last two are not waited for yet"
    held.wait()
    assert [place.tolist() for place in places] == [[number] * 6 for number in range(9)]
    assert len(addresses) == 2


def test_a_failing_copy_is_waited_for(late: list[LateStream], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefilled("llama", tokens=150).save_pretrained(tmp_path)
    copy = LateStream.copy

    def failing(self: LateStream, pairs: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
        wait = copy(self, pairs)
        if self.copies == 3:
            raise torch.OutOfMemoryError("injected")
        return wait

    monkeypatch.setattr(LateStream, "copy", failing)
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        SpinCache.from_pretrained(tmp_path, subject_model("llama"))
    assert not any(stream.waiting for stream in late)
    assert not loading()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=["interrupt", "memory"])
def test_an_error_while_memory_is_allocated(
    error: BaseException, late: list[LateStream], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second layer cannot be allocated while pieces of the first one are read."""
    prefilled("llama", tokens=150).save_pretrained(tmp_path)
    attach, number = PageStore.reserve, [0]

    def reserve(self: PageStore, *room: Any) -> bool:
        number[0] += 1
        if number[0] > 1:
            raise error
        return attach(self, *room)

    monkeypatch.setattr(PageStore, "reserve", reserve)
    with pytest.raises(type(error)):
        SpinCache.from_pretrained(tmp_path, subject_model("llama"))
    assert number[0] == 2
    assert not any(stream.waiting for stream in late)
    assert not loading()


def test_a_layer_is_read_while_the_next_one_is_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefilled("llama", tokens=150).save_pretrained(tmp_path)
    reserve, read, was_read, number = PageStore.reserve, opened.OpenCache._read, threading.Event(), [0]

    def slow_reserve(self: PageStore, *room: Any) -> bool:
        number[0] += 1
        if number[0] > 1:
            assert was_read.wait(30), "nothing was read before the second layer"
        return reserve(self, *room)

    def noted(self: Any, piece: Any, held: Staging) -> None:
        read(self, piece, held)
        if piece.part.spec.name == "layers.0.pages":
            was_read.set()

    monkeypatch.setattr(PageStore, "reserve", slow_reserve)
    monkeypatch.setattr(opened.OpenCache, "_read", noted)
    SpinCache.from_pretrained(tmp_path, subject_model("llama"))
    assert number[0] > 1


def test_an_error_drops_what_no_thread_has_begun() -> None:
    begun: list[int] = []

    def read(piece: int, held: Staging) -> None:
        begun.append(piece)
        time.sleep(0.01)
        if piece == 5:
            raise ValueError("injected")

    with pytest.raises(ValueError, match="injected"), PieceReader(read, 2) as reader:
        reader.submit(range(1000))
        reader.finish()
    assert len(begun) < 10
    assert not loading()
    begun.clear()
    with pytest.raises(KeyboardInterrupt), PieceReader(read, 2) as reader:
        reader.submit(range(6, 1000))
        raise KeyboardInterrupt
    count = len(begun)
    assert count < 10
    time.sleep(0.05)
    assert len(begun) == count, "a thread went on"


def test_a_later_submission_says_what_failed() -> None:
    def read(piece: int, held: Staging) -> None:
        raise ValueError("injected")

    with pytest.raises(ValueError, match="injected"), PieceReader(read, 2) as reader:
        reader.submit([1])
        for _ in range(1000):
            time.sleep(0.001)
            reader.submit([2])


def test_threads_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threading.Thread.start, [0]

    def failing(self: threading.Thread) -> None:
        started[0] += 1
        if started[0] == 3:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", failing)
    with pytest.raises(RuntimeError, match="can't start"), PieceReader(lambda piece, held: None, 4):
        pass
    assert not loading()


def test_memory_is_locked_ahead_for_layers_that_are_alike() -> None:
    page, window = PagedLayer(2, 16, 16, torch.float32, False, 100, 5), OtherLayer("DynamicLayer", {}, {})
    wider, elsewhere = replace(page, num_heads=4), torch.device("meta")
    entries = [window, page, None, page, wider, page, page]
    devices = [CPU, CPU, CPU, CPU, CPU, elsewhere, CPU, CPU]
    assert [later_layers_alike(entries, devices, index) for index in (1, 3, 4, 6)] == [2, 1, 0, 0]
