"""Slabs in several pieces: touched while earlier pieces are registered, and released completely wherever that fails."""

from __future__ import annotations

import mmap
import os
import threading
import time

import pytest
import torch

from spin_hf.errors import CapacityError
from spin_hf.storage import pinned_slab
from spin_hf.storage.pinned_slab import HUGE_PAGE, PAGE, HostSlab, allocate_rows
from tests.support.fake_registrar import FakeRegistrar, RefusedError
from tests.support.resident_memory import needs_smaps, resident_bytes

CUDA = torch.device("cuda", 0)
MIB = 1 << 20
pytestmark = pytest.mark.usefixtures("maps")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 4 MiB and tasks of 2 MiB, done by three threads."""
    monkeypatch.setattr(pinned_slab, "PIECE_BYTES", 4 * MIB)
    monkeypatch.setattr(pinned_slab, "_TASK_BYTES", HUGE_PAGE)
    monkeypatch.setattr(pinned_slab, "_THREADED_BYTES", HUGE_PAGE)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)


@needs_smaps
@pytest.mark.parametrize(
    ("num_bytes", "unit_bytes", "sizes"),
    [
        (4 * MIB, PAGE, [4 * MIB]),
        (4 * MIB + 1, PAGE, [4 * MIB, PAGE]),
        (11 * MIB, PAGE, [4 * MIB, 4 * MIB, 3 * MIB]),
        (9 * MIB, 3 * MIB, [3 * MIB] * 3),
        (15 * 5 * PAGE * 128, 5 * PAGE * 128, [2560 * 1024] * 15),
        (20 * MIB, 5 * MIB, [5 * MIB] * 4),  # a unit larger than a piece
        (6 * MIB, 6 * MIB, [6 * MIB]),
        (3000 * PAGE, 3 * PAGE, [1023 * PAGE, 1023 * PAGE, 954 * PAGE]),  # borders inside of huge pages
    ],
)
@pytest.mark.usefixtures("small_pieces")
def test_pieces_follow_each_other_and_end_with_units(
    registrar: FakeRegistrar, num_bytes: int, unit_bytes: int, sizes: list[int]
) -> None:
    there: list[bool] = []
    registrar.inspect = lambda address, size: there.append(resident_bytes(address, size) == size)
    slab = HostSlab(num_bytes, registrar, unit_bytes)
    end = first = slab.tensor.data_ptr()
    for address, size in registrar.registered.items():  # in the order of registering
        assert address == end
        assert (address - first) % unit_bytes == 0
        end += size
    assert list(registrar.registered.values()) == sizes
    assert there == [True] * len(sizes)
    assert int(slab.tensor.fill_(1).sum()) == num_bytes
    del slab
    assert not registrar.registered
    assert registrar.open_when_unregistered == [True] * len(sizes)


@pytest.mark.usefixtures("small_pieces")
def test_registering_does_not_wait_for_later_pieces(registrar: FakeRegistrar, monkeypatch: pytest.MonkeyPatch) -> None:
    first = threading.Event()
    waited: list[bool] = []
    touch = pinned_slab._touch
    registrar.inspect = lambda address, num_bytes: first.set()

    def touch_later_ones_late(address: int, num_bytes: int) -> None:
        if len(order) >= 2:
            waited.append(first.wait(5))
        touch(address, num_bytes)

    order: list[int] = []
    monkeypatch.setattr(pinned_slab, "_touch", lambda *args: (touch_later_ones_late(*args), order.append(args[0])))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    HostSlab(10 * MIB, registrar)
    assert waited == [True] * 3
    assert order == sorted(order)


@pytest.mark.parametrize("refused", range(5))
@pytest.mark.usefixtures("small_pieces")
def test_refusal_of_any_piece_leaves_nothing(registrar: FakeRegistrar, maps: list[mmap.mmap], refused: int) -> None:
    def refuse(address: int, num_bytes: int) -> None:
        if len(registrar.registered) == refused:
            raise RefusedError("refused")

    registrar.inspect = refuse
    with pytest.raises(
        CapacityError, match="^refused$" if not refused else rf"{18 * MIB} .* got {refused * 4 * MIB} .*refused"
    ):
        HostSlab(18 * MIB, registrar)
    assert [event for event, _ in registrar.history] == ["register"] * refused + ["unregister"] * refused
    assert not registrar.registered
    assert [mapping.closed for mapping in maps] == [True]
    assert not pinned_slab._mappings
    registrar.inspect = lambda *args: None
    HostSlab(18 * MIB, registrar)
    assert len(registrar.history) == 2 * refused + 10


@pytest.mark.usefixtures("small_pieces")
def test_refusal_calls_off_the_touching(registrar: FakeRegistrar, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    monkeypatch.setattr(pinned_slab, "_touch", lambda address, num_bytes: (begun.append(address), time.sleep(0.002)))
    registrar.refuses = True
    with pytest.raises(RefusedError):
        HostSlab(200 * MIB, registrar)
    assert len(begun) < 50


@pytest.mark.parametrize(
    "error", [MemoryError("a thread's"), CapacityError("a thread's"), KeyboardInterrupt("a thread's")]
)
@pytest.mark.parametrize("failing", range(5))
@pytest.mark.usefixtures("small_pieces")
def test_error_of_a_thread_leaves_nothing(
    registrar: FakeRegistrar, maps: list[mmap.mmap], monkeypatch: pytest.MonkeyPatch, failing: int, error: BaseException
) -> None:
    begun, ended, touch = [], [], pinned_slab._touch

    def fail(address: int, num_bytes: int) -> None:
        begun.append(address)
        time.sleep(0.002)
        try:
            if address == min(begun) + failing * HUGE_PAGE:
                raise error
            touch(address, num_bytes)  # a crash, where the memory is unmapped by now
        finally:
            ended.append(address)

    monkeypatch.setattr(pinned_slab, "_touch", fail)
    with pytest.raises(type(error), match=r"^a thread's$"):
        HostSlab(40 * MIB, registrar)
    assert sorted(begun) == sorted(ended)
    assert len(begun) < 20  # what has not begun is called off
    assert [event for event, _ in registrar.history] == ["register"] * (failing // 2) + ["unregister"] * (failing // 2)
    assert not registrar.registered
    assert [mapping.closed for mapping in maps] == [True]


def test_interrupt_while_registering(registrar: FakeRegistrar, maps: list[mmap.mmap]) -> None:
    """It comes when the driver has done it, and before anybody could write that down."""

    def interrupt(address: int, num_bytes: int) -> None:
        registrar.registered[address] = num_bytes
        raise KeyboardInterrupt

    registrar.inspect = interrupt
    with pytest.raises(KeyboardInterrupt):
        HostSlab(PAGE, registrar)
    assert not registrar.registered
    assert [mapping.closed for mapping in maps] == [True]


@pytest.mark.usefixtures("small_pieces")
def test_refusal_does_not_disturb_a_capture(registrar: FakeRegistrar, maps: list[mmap.mmap]) -> None:
    def refuse(address: int, num_bytes: int) -> None:
        if len(registrar.registered) == 2:
            raise RefusedError("refused")

    registrar.inspect, registrar.captures = refuse, True
    with pytest.raises(CapacityError, match="refused"):
        HostSlab(18 * MIB, registrar)
    assert [event for event, _ in registrar.history] == ["register", "register"]
    assert not maps[0].closed
    registrar.inspect, registrar.captures = lambda *args: None, False
    slab = HostSlab(PAGE, registrar)
    assert maps[0].closed
    assert list(registrar.registered) == [slab.tensor.data_ptr()]


@pytest.mark.usefixtures("small_pieces")
def test_failed_device_leaves_no_mapping_of_many_pieces(registrar: FakeRegistrar, maps: list[mmap.mmap]) -> None:
    registrar.breaks = True
    HostSlab(18 * MIB, registrar)
    assert registrar.open_when_unregistered == [True]
    assert maps[0].closed


@pytest.mark.parametrize("rows", [64, 100, 700])
@pytest.mark.usefixtures("small_pieces")
def test_no_chunk_lies_in_two_pieces(registrar: FakeRegistrar, rows: int) -> None:
    chunks = allocate_rows(24, (rows, 2048), torch.float32, compute_device=CUDA)
    assert len(registrar.registered) > 1
    assert all(registrar.has(chunk) for chunk in chunks)
    for number, chunk in enumerate(chunks):
        chunk.fill_(number)
    assert [bool((chunk == number).all()) for number, chunk in enumerate(chunks)] == [True] * 24
    chunks.clear()
    del chunk
    assert not registrar.registered
