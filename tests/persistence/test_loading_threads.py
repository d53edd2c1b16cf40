"""Threads that load a saved cache: what is copied is right, reading begins early, and an error leaves no thread and no copy."""

from __future__ import annotations

import ctypes
import gc
import json
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spin_hf import SavedCacheError, SpinCache
from spin_hf.persistence import opened, staging
from spin_hf.persistence.checksum import piece_checksum
from spin_hf.persistence.files import OpenFile
from spin_hf.persistence.manifest import OtherLayer, PagedLayer
from spin_hf.persistence.piece_reader import PieceReader
from spin_hf.persistence.reader import later_layers_alike
from spin_hf.persistence.staging import NUM_BUFFERS, Staging
from spin_hf.storage.page_store import PageStore
from tests.support.late_copies import LateStream, copies_are_late, small_blocks
from tests.support.memory import with_tight_gpu_memory
from tests.support.saved_caches import assert_goes_on, prefilled
from tests.support.zoo import subject_model

CPU = torch.device("cpu")


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[LateStream]:
    """All pages go through buffers and streams that copy late. Pieces are small."""
    return copies_are_late(monkeypatch)


def summed_on_host(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each call of `piece_checksum` from here on."""
    sizes = list[int]()

    def noted(buffers: list[memoryview], *before: bytes) -> bytes:
        sizes.append(sum(buffer.nbytes for buffer in buffers))
        return piece_checksum(buffers, *before)

    monkeypatch.setattr(opened, "piece_checksum", noted)
    return sizes


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
    on_host = summed_on_host(monkeypatch)
    SpinCache.from_pretrained(tmp_path, subject_model("llama"))
    (file,) = tmp_path.glob("*.safetensors")
    header = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    sizes = {name: about["data_offsets"] for name, about in header.items() if name != "__metadata__"}
    assert sum(on_host) == sum(end - begin for name, (begin, end) in sizes.items() if not name.startswith("layers."))
    of_pages = [span for name, span in sizes.items() if name.startswith("layers.")]
    assert_damage_is_found(file, of_pages)
    assert_goes_on(subject_model("llama"), cache, SpinCache.from_pretrained(tmp_path, subject_model("llama")))


def test_pages_in_host_memory_are_checked_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread checks what it reads, a block at a time, and damage of any block is found."""
    small_blocks(monkeypatch)
    cache = prefilled("llama", tokens=150)
    cache.save_pretrained(tmp_path)
    sizes = summed_on_host(monkeypatch)
    assert_goes_on(subject_model("llama"), cache, SpinCache.from_pretrained(tmp_path, subject_model("llama")))
    assert sizes.count(2048) > 32
    assert max(sizes) < 4096, "a piece was read at once"
    (file,) = tmp_path.glob("*.safetensors")
    size = file.stat().st_size
    assert_damage_is_found(file, [(at, min(at + 16384, size)) for at in range(0, size, 16384)], behind_header=False)


def assert_damage_is_found(file: Path, spans: list[tuple[int, int]], behind_header: bool = True) -> None:
    """A changed first or last byte of each span of a file is refused. Leaves the file as it was."""
    whole = file.read_bytes()
    first = 8 + int.from_bytes(whole[:8], "little") if behind_header else 0
    for begin, end in spans:
        for at in (begin, end - 1):
            damaged = bytearray(whole)
            damaged[first + at] ^= 1
            file.write_bytes(damaged)
            with pytest.raises(SavedCacheError):
                SpinCache.from_pretrained(file.parent, subject_model("llama"))
    file.write_bytes(whole)


def test_a_buffer_is_free_before_it_is_filled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks end where a place ends. As many copies as there are buffers are on their way."""
    copies_are_late(monkeypatch, block_bytes=6)
    held, places, addresses = Staging(), [torch.zeros(size, dtype=torch.uint8) for size in (20, 3, 12, 6)], set()
    content = bytes(range(1, 42))

    def read(views: list[memoryview], offset: int) -> None:
        (view,) = views
        addresses.add(ctypes.addressof(ctypes.c_char.from_buffer(view)))
        view[:] = content[offset : offset + len(view)]

    with held.upload(CPU) as upload:
        upload.read(read, 0, places)
    copied = torch.cat(places).tolist()
    late = [6, 2, 3, 6, 6, 6][-NUM_BUFFERS:]
    assert copied == [*content[: 41 - sum(late)], *[0] * sum(late)], "the last ones are not waited for yet"
    held.wait()
    assert torch.cat(places).tolist() == list(content)
    assert len(addresses) == NUM_BUFFERS


@pytest.mark.parametrize("size", [3, 6, 8])
def test_what_is_fetched_is_handed_over(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made behind the copies, and handed over once its buffer is needed; at once if it fits no buffer."""
    copies_are_late(monkeypatch, block_bytes=6)
    held, place, found = Staging(), torch.zeros(8, dtype=torch.uint8), list[list[int]]()

    def read(views: list[memoryview], offset: int) -> None:
        views[0][:] = bytes([offset + 1] * len(views[0]))

    for number in range(5):
        with held.upload(CPU) as upload:
            upload.read(read, 10 * number, [place])
            upload.fetch(size, lambda: place[-size:] + 1, lambda memory: found.append(list(memory)))
        assert (len(found) == number + 1) == (size > 6)
    assert found
    held.wait()
    expected = [[*[10 * number + 2] * 6, *[10 * number + 8] * 2][-size:] for number in range(5)]
    assert found == expected


def test_a_failing_copy_is_waited_for(late: list[LateStream], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefilled("llama", tokens=150).save_pretrained(tmp_path)
    copy = LateStream.copy

    def failing(self: LateStream, place: Tensor, content: Tensor) -> None:
        copy(self, place, content)
        if self.copies == 3:
            raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(LateStream, "copy", failing)
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        SpinCache.from_pretrained(tmp_path, subject_model("llama"))
    assert not any(stream.waiting for stream in late)
    assert not loading()


def test_a_file_that_is_cut_while_it_is_read(
    late: list[LateStream], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks before its end are on their way to the GPU. They are waited for, and buffers and pages are freed."""
    prefilled("llama", tokens=150).save_pretrained(tmp_path)
    read, allocate, reserve = OpenFile._read, staging._allocate, PageStore.reserve
    held, in_threads = list[weakref.ref[Any]](), [0]

    def cut(self: OpenFile, views: list[memoryview], offset: int) -> int:
        in_threads[0] += threading.current_thread() is not threading.main_thread()
        return 0 if in_threads[0] > 30 else read(self, views, offset)

    def noted(num_bytes: int, locks: bool) -> Tensor:
        held.append(weakref.ref(buffer := allocate(num_bytes, locks)))
        return buffer

    def noted_pages(self: PageStore, *room: Any) -> None:
        reserve(self, *room)
        held.append(weakref.ref(self))

    monkeypatch.setattr(OpenFile, "_read", cut)
    monkeypatch.setattr(staging, "_allocate", noted)
    monkeypatch.setattr(PageStore, "reserve", noted_pages)
    with pytest.raises(SavedCacheError, match="was it cut"):
        SpinCache.from_pretrained(tmp_path, subject_model("llama"))
    assert sum(stream.copies for stream in late) > 8
    assert not any(stream.waiting for stream in late)
    assert not loading()
    gc.collect()
    assert len(held) > 2
    assert not any(each() for each in held)


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
