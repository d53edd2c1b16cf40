"""Host slabs without a GPU: which pieces are registered, when they are unmapped, and the state after a refusal."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spin_hf.errors import CapacityError
from spin_hf.storage import pinned_slab
from spin_hf.storage.pinned_slab import HUGE_PAGE, PAGE, HostSlab, allocate_rows
from tests.support.fake_registrar import FakeRegistrar, RefusedError
from tests.support.resident_memory import needs_smaps, resident_bytes, smaps

CUDA = torch.device("cuda", 0)
MIB = 1 << 20
pytestmark = pytest.mark.usefixtures("maps")


@pytest.mark.parametrize("num_bytes", [1, 4096, 5000, HUGE_PAGE - 1, HUGE_PAGE, 3 * HUGE_PAGE + 17])
def test_slab_is_aligned_registered_memory(registrar: FakeRegistrar, num_bytes: int) -> None:
    tensor = HostSlab(num_bytes, registrar).tensor
    assert (tensor.dtype, tensor.device.type, tensor.shape) == (torch.uint8, "cpu", (num_bytes,))
    assert tensor.data_ptr() % (HUGE_PAGE if num_bytes >= HUGE_PAGE else PAGE) == 0
    ((address, registered),) = registrar.registered.items()
    assert address == tensor.data_ptr()
    assert registered % PAGE == 0
    assert 0 <= registered - num_bytes < PAGE
    expected = (torch.arange(num_bytes) % 251).to(torch.uint8)
    tensor.copy_(expected)
    assert ctypes.string_at(address, num_bytes) == bytes(expected.tolist())


@needs_smaps
@pytest.mark.parametrize("cpus", [1, 3, 64, None])
@pytest.mark.parametrize("num_bytes", [3 * PAGE, 11 * HUGE_PAGE + 3 * PAGE])
def test_all_pages_are_there_before_registering(
    registrar: FakeRegistrar, monkeypatch: pytest.MonkeyPatch, num_bytes: int, cpus: int | None
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    resident: list[int] = []
    registrar.inspect = lambda address, size: resident.append(smaps(address)[0])
    slab = HostSlab(num_bytes, registrar)
    assert resident[0] >= num_bytes
    assert int(slab.tensor.sum()) == 0


@pytest.mark.parametrize("cpus", [1, 3, 12, 64])
@pytest.mark.parametrize("pages", [1, 512, 513, 20 * 512 + 1, 100 * 512, 2000 * 512 + 7])
def test_threads_touch_everything_once(
    registrar: FakeRegistrar, monkeypatch: pytest.MonkeyPatch, pages: int, cpus: int
) -> None:
    touched: list[tuple[int, int]] = []
    threads: set[int] = set()

    def touch(address: int, num_bytes: int) -> None:
        threads.add(threading.get_ident())
        touched.append((address, num_bytes))

    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    monkeypatch.setattr(pinned_slab, "_touch", touch)
    monkeypatch.setattr(pinned_slab, "_THREADED_BYTES", 0)
    pinned_slab._touch_and_register(HUGE_PAGE, pages * PAGE, PAGE, registrar, [])
    end = HUGE_PAGE
    for address, num_bytes in sorted(touched):
        assert address == end
        assert address % HUGE_PAGE == 0
        assert num_bytes <= pinned_slab._TASK_BYTES
        end = address + num_bytes
    assert end == HUGE_PAGE + pages * PAGE
    assert len(threads) <= min(16, cpus)
    if pages >= 100 * 512:
        assert len(touched) >= min(16, cpus) * 0.8  # the work is spread


# ------------------------------------------------------------------------------------------------------------- advice


class FakeLibc:
    """The C library of a kernel that answers `madvise` with an error."""

    def __init__(self, error: int) -> None:
        self.error = error

    def madvise(self, *args: Any) -> int:
        ctypes.set_errno(self.error)
        return -1


@needs_smaps
@pytest.mark.parametrize("error", [errno.EINVAL, errno.EPERM, errno.ENOSYS])
def test_kernel_without_populating(registrar: FakeRegistrar, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **named: FakeLibc(error))
    slab = HostSlab(5 * MIB, registrar)
    assert resident_bytes(slab.tensor.data_ptr(), 5 * MIB) == 5 * MIB


@needs_smaps
@pytest.mark.parametrize("advice", [23, 12345])
def test_populating_by_this_kernel(registrar: FakeRegistrar, monkeypatch: pytest.MonkeyPatch, advice: int) -> None:
    monkeypatch.setattr(pinned_slab, "_MADV_POPULATE_WRITE", advice)
    slab = HostSlab(5 * MIB, registrar)
    assert resident_bytes(slab.tensor.data_ptr(), 5 * MIB) == 5 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
@pytest.mark.parametrize("num_bytes", [PAGE, 80 * MIB])
def test_no_more_pages(
    registrar: FakeRegistrar, maps: list[mmap.mmap], monkeypatch: pytest.MonkeyPatch, num_bytes: int
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **named: FakeLibc(errno.ENOMEM))
    with pytest.raises(CapacityError, match="shorten the context"):
        HostSlab(num_bytes, registrar)
    assert not registrar.history
    assert [mapping.closed for mapping in maps] == [True]


@needs_smaps
def test_memory_is_huge_and_not_inherited(registrar: FakeRegistrar) -> None:
    slab = HostSlab(2 * HUGE_PAGE, registrar)
    flags = smaps(slab.tensor.data_ptr())[1]
    assert "dc" in flags  # do not copy on fork
    assert "hg" in flags or not Path("/sys/kernel/mm/transparent_hugepage").exists()


def test_platform_without_advice(registrar: FakeRegistrar, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        monkeypatch.delattr(mmap, name, raising=False)
    assert int(HostSlab(HUGE_PAGE, registrar).tensor.sum()) == 0


def test_kernel_that_refuses_advice(registrar: FakeRegistrar, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        monkeypatch.setattr(mmap, name, 12345, raising=False)
    assert int(HostSlab(HUGE_PAGE, registrar).tensor.sum()) == 0


VIEWS: dict[str, Callable[[HostSlab], Any]] = {
    "slab": lambda slab: slab,
    "tensor": lambda slab: slab.tensor,
    "slice": lambda slab: slab.tensor[4096:4100],
    "typed": lambda slab: slab.tensor[8:4096].view(torch.float32).view(2, -1),
    "storage": lambda slab: slab.tensor.untyped_storage(),
    "detached": lambda slab: slab.tensor.detach(),
    "array": lambda slab: slab.tensor[16:].numpy(),
}


@pytest.mark.parametrize("view", VIEWS)
def test_last_view_gives_the_memory_back(registrar: FakeRegistrar, maps: list[mmap.mmap], view: str) -> None:
    slab = HostSlab(2 * PAGE, registrar)
    address = slab.tensor.data_ptr()
    last = VIEWS[view](slab)
    del slab
    assert registrar.history == [("register", address)]
    assert not maps[0].closed
    del last
    assert registrar.history == [("register", address), ("unregister", address)]
    assert registrar.open_when_unregistered == [True]
    assert maps[0].closed


def test_views_in_a_reference_cycle(registrar: FakeRegistrar, maps: list[mmap.mmap]) -> None:
    cycle: dict[str, Any] = {"tensor": HostSlab(PAGE, registrar).tensor}
    cycle["self"] = cycle
    del cycle
    gc.collect()
    assert not registrar.registered
    assert maps[0].closed


def test_refusal_leaves_nothing(registrar: FakeRegistrar, maps: list[mmap.mmap]) -> None:
    registrar.refuses = True
    with pytest.raises(RefusedError):
        HostSlab(HUGE_PAGE, registrar)
    assert [mapping.closed for mapping in maps] == [True]
    assert not pinned_slab._mappings
    registrar.refuses = False
    HostSlab(HUGE_PAGE, registrar)
    assert [event for event, _ in registrar.history] == ["register", "unregister"]


@pytest.mark.parametrize("num_bytes", [1 << 62, 1 << 70])
def test_more_than_the_system_has(registrar: FakeRegistrar, num_bytes: int) -> None:
    with pytest.raises(CapacityError, match=rf"{num_bytes >> 30}\.00 GiB.*shorten the context"):
        HostSlab(num_bytes, registrar)
    assert not registrar.history


def test_failed_device_is_no_error_of_a_finalizer(registrar: FakeRegistrar, maps: list[mmap.mmap]) -> None:
    registrar.breaks = True
    HostSlab(PAGE, registrar)
    assert registrar.open_when_unregistered == [True]
    assert maps[0].closed


def test_capture_is_not_disturbed(registrar: FakeRegistrar, maps: list[mmap.mmap]) -> None:
    registrar.captures = True
    for _ in range(3):
        HostSlab(PAGE, registrar)
    assert [event for event, _ in registrar.history] == ["register"] * 3
    assert not any(mapping.closed for mapping in maps)
    registrar.captures = False
    slab = HostSlab(PAGE, registrar)
    assert [mapping.closed for mapping in maps] == [True, True, True, False]
    assert list(registrar.registered) == [slab.tensor.data_ptr()]


def test_background_threads_leave_giving_back_to_others(registrar: FakeRegistrar, maps: list[mmap.mmap]) -> None:
    thread = threading.Thread(target=lambda: HostSlab(PAGE, registrar), name=f"{pinned_slab.THREAD_PREFIX}ahead")
    thread.start()
    thread.join()
    assert len(registrar.registered) == 1
    assert not maps[0].closed
    HostSlab(PAGE, registrar)
    assert not registrar.registered


def test_threads_at_once(registrar: FakeRegistrar) -> None:
    failures: list[BaseException] = []
    start = threading.Barrier(8)

    def work(number: int) -> None:
        try:
            start.wait()
            for _ in range(20):
                tensors = [HostSlab(3 * PAGE, registrar).tensor.fill_(number) for _ in range(3)]
                assert all(bool((tensor == number).all()) for tensor in tensors)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not registrar.registered
    assert len(registrar.history) == 2 * 8 * 20 * 3
    assert all(registrar.open_when_unregistered)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("chunk_shape", [(5,), (4, 1024), (3, 7, 100)])
def test_chunks_share_one_slab(registrar: FakeRegistrar, chunk_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    chunks = allocate_rows(4, chunk_shape, dtype, compute_device=CUDA)
    ((address, registered),) = registrar.registered.items()
    for number, chunk in enumerate(chunks):
        assert (chunk.shape, chunk.dtype, chunk.device.type) == (chunk_shape, dtype, "cpu")
        assert chunk.is_contiguous()
        assert chunk.data_ptr() % 4096 == 0
        assert address <= chunk.data_ptr() <= chunk.data_ptr() + chunk.nbytes <= address + registered
        chunk.fill_(number)
    assert [bool((chunk == number).all()) for number, chunk in enumerate(chunks)] == [True] * 4
    last = chunks.pop()
    chunks.clear()
    del chunk
    assert registrar.registered
    del last
    assert not registrar.registered


def test_chunks_of_a_cpu_device_are_ordinary(registrar: FakeRegistrar) -> None:
    chunks = allocate_rows(3, (2, 3), torch.float16, compute_device=torch.device("cpu"))
    assert [chunk.shape for chunk in chunks] == [(2, 3)] * 3
    assert not registrar.history
    addresses = {chunk.untyped_storage().data_ptr() for chunk in chunks}
    assert len(addresses) == 3


@pytest.mark.parametrize(("num_chunks", "chunk_shape"), [(0, (2, 3)), (2, (0, 3))])
def test_nothing_is_registered_for_nothing(
    registrar: FakeRegistrar, num_chunks: int, chunk_shape: tuple[int, ...]
) -> None:
    chunks = allocate_rows(num_chunks, chunk_shape, torch.float32, compute_device=CUDA)
    assert [chunk.shape for chunk in chunks] == [chunk_shape] * num_chunks
    assert not registrar.history
