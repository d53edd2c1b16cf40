"""Chunks made ahead of need: who waits for whom, and the state after a stop, a fork and the end of the process."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch

from spin_hf.errors import CapacityError
from spin_hf.storage.pinned_slab import PAGE, HostSlab
from spin_hf.storage.slab_prefetch import PrefetchedSlab, SlabPrefetcher
from tests.support import fork_server
from tests.support.fake_registrar import FakeRegistrar

CUDA = torch.device("cuda", 0)
pytestmark = pytest.mark.usefixtures("maps")


class Maker:
    """Replaces `allocate_rows`; makes a chunk only when the test allows it."""

    def __init__(self) -> None:
        self.gate, self.begun = threading.Semaphore(0), threading.Semaphore(0)
        self.threads: list[threading.Thread] = []
        self.made: list[tuple[int, ...]] = []
        self.failing = False

    def __call__(
        self, count: int, shape: tuple[int, ...], dtype: torch.dtype, *, compute_device: torch.device
    ) -> list[torch.Tensor]:
        assert (count, compute_device) == (1, CUDA)
        self.threads.append(threading.current_thread())
        self.begun.release()
        assert self.gate.acquire(timeout=30)
        if self.failing:
            raise CapacityError("no memory")
        self.made.append(shape)
        return [torch.zeros(shape, dtype=dtype)]


@pytest.fixture
def maker() -> Maker:
    return Maker()


@pytest.fixture
def reserve(maker: Maker) -> Iterator[SlabPrefetcher]:
    made = SlabPrefetcher(maker)
    yield made
    for _ in range(100):
        maker.gate.release()
    made.stop()
    assert made._thread is None or not made._thread.is_alive()


def ask(reserve: SlabPrefetcher, size: int = 3) -> PrefetchedSlab:
    return reserve.ask((size,), torch.float16, compute_device=CUDA)


def begun(maker: Maker) -> None:
    assert maker.begun.acquire(timeout=30)


def test_asking_does_not_wait_and_taking_does(reserve: SlabPrefetcher, maker: Maker) -> None:
    spare = ask(reserve)
    begun(maker)
    assert not maker.made  # and yet `ask` has returned
    timer = threading.Timer(0.05, maker.gate.release)
    timer.start()
    (chunk,) = spare.take() or []
    assert (chunk.shape, chunk.dtype) == ((3,), torch.float16)
    assert spare.take() is None


def test_one_thread_in_order_of_asking(reserve: SlabPrefetcher, maker: Maker) -> None:
    spares = [ask(reserve, size) for size in range(1, 9)]
    for _ in spares:
        maker.gate.release()
    for _ in spares:
        begun(maker)
    slabs = [spare.take() or [] for spare in spares]
    assert [chunk.numel() for slab in slabs for chunk in slab] == list(range(1, 9))
    assert maker.made == [(size,) for size in range(1, 9)]
    assert len(set(maker.threads)) == 1
    assert maker.threads[0].daemon
    assert maker.threads[0] is not threading.current_thread()


def test_low_numbers_come_first(reserve: SlabPrefetcher, maker: Maker) -> None:
    """All layers need their second chunk before any needs its third."""
    first = ask(reserve, 1)
    begun(maker)  # it is being made while the others are asked for
    others = [
        reserve.ask((size,), torch.float16, compute_device=CUDA, number=number)
        for size, number in ((10, 1), (11, 2), (12, 3), (20, 1), (21, 2))
    ]
    for _ in range(6):
        maker.gate.release()
    for spare in (first, *others):
        while spare._chunks is None:
            threading.Event().wait(0.01)
    assert maker.made == [(1,), (10,), (20,), (11,), (21,), (12,)]


def test_taking_before_the_making_begins_calls_it_off(reserve: SlabPrefetcher, maker: Maker) -> None:
    first, second, third = ask(reserve, 1), ask(reserve, 2), ask(reserve, 3)
    begun(maker)
    assert second.take() is None  # does not wait for its turn
    for _ in range(3):
        maker.gate.release()
    begun(maker)
    assert third.take() is not None
    assert first.take() is not None
    assert maker.made == [(1,), (3,)]


def test_spares_of_arrays_that_died_are_not_made(reserve: SlabPrefetcher, maker: Maker) -> None:
    first, second, third = ask(reserve, 1), ask(reserve, 2), ask(reserve, 3)
    begun(maker)
    del second
    for _ in range(3):
        maker.gate.release()
    begun(maker)
    assert first.take() is not None
    assert third.take() is not None
    assert maker.made == [(1,), (3,)]


def test_errors_stay_in_the_background(reserve: SlabPrefetcher, maker: Maker) -> None:
    maker.failing = True
    spare = ask(reserve)
    maker.gate.release()
    begun(maker)
    assert spare.take() is None
    maker.failing = False
    maker.gate.release()
    spare = ask(reserve)  # the thread lives on
    begun(maker)
    assert spare.take() is not None


def test_dropped_spare_gives_its_memory_back(registrar: FakeRegistrar) -> None:
    begun = threading.Event()
    registrar.inspect = lambda address, num_bytes: begun.set()
    reserve = SlabPrefetcher()
    spare = reserve.ask((3,), torch.float16, compute_device=CUDA)
    assert begun.wait(30)
    with spare._lock:  # until it is filled
        assert len(registrar.registered) == 1
    del spare
    reserve.stop()
    HostSlab(PAGE, registrar)  # gives back what the background thread was perhaps the last to hold
    assert [event for event, _ in registrar.history] == ["register", "unregister"] * 2


def test_thread_that_waits_keeps_no_spare(reserve: SlabPrefetcher, maker: Maker) -> None:
    spare = ask(reserve)
    begun(maker)
    maker.gate.release()
    with spare._lock:  # until it is filled
        assert spare._chunks is not None
    gone = threading.Event()
    weakref.finalize(spare, gone.set)
    del spare
    assert gone.wait(30)


def test_reserve_that_was_stopped_leaves_it_to_the_foreground(reserve: SlabPrefetcher, maker: Maker) -> None:
    reserve.stop()
    assert ask(reserve).take() is None
    assert not maker.threads


PROCESS = """
import atexit, ctypes, gc, mmap, os, sys

@atexit.register  # before the package's own, so that it is called after that
def _late():
    assert not PREFETCHER._thread.is_alive(), "a thread may be in the driver"
    assert int(tensor.sum()) == 7 * tensor.numel()

import torch
from spin_hf.storage import pinned_slab as host
from spin_hf.storage.slab_prefetch import PREFETCHER

class Registrar:
    calls = []
    def register(self, address, num_bytes):
        self.calls.append(address)
    def unregister(self, address):
        os.write(1, b"unregistered")
    def capturing(self):
        return False

reserve = PREFETCHER
reserve._allocate = lambda *args, **named: [host.HostSlab(4 << 20, Registrar()).tensor]
spares = [reserve.ask((1,), torch.uint8, compute_device=torch.device("cuda")) for _ in range(3)]
tensor = host.HostSlab(8 << 20, Registrar()).tensor.fill_(7)
cycle = [host.HostSlab(8 << 20, Registrar()).tensor]
cycle.append(cycle)
"""

FORK = """
import time
while len(Registrar.calls) < 5:
    time.sleep(0.01)
address = tensor.data_ptr()
child = os.fork()
if not child:
    # What takes the place of the slab in the child must survive the death of the tensor.
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    here = libc.mmap(address, 8 << 20, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    assert here == address, "the child has inherited the slab"
    ctypes.memset(here, 5, 8 << 20)
    del tensor, cycle, spares
    gc.collect()
    assert ctypes.string_at(here + (8 << 20) - 1, 1) == b"\\5"
    atexit.unregister(_late)
    sys.exit(3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
assert bool((tensor == 7).all())
"""


@pytest.mark.parametrize("end", ["", FORK])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_process_ends_quietly(end: str) -> None:
    """Slabs and spares alive at the end, and a fork: no crash, no output, no call into a driver that may be gone."""
    result = fork_server.finished("import warnings\nwarnings.simplefilter('error')\n" + PROCESS + end)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
