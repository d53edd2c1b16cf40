"""Host slabs without a GPU: who is unmapped when, in which order, what a refusal leaves, and the reserve's thread.

A fake registrar stands for the driver and writes down what happens to the memory.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spin_hf.errors import CapacityError
from spin_hf.storage import host
from spin_hf.storage.host import HUGE_PAGE, PAGE, CudaRegistrar, HostSlab, SlabReserve, Spare, allocate_rows

CUDA = torch.device("cuda", 0)
needs_smaps = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux only")


class RefusedError(CapacityError):
    """What the fake driver raises."""


class FakeRegistrar:
    """Writes down calls; `inspect` is called with every range before it is registered."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.history: list[tuple[str, int]] = []
        self.open_when_unregistered: list[bool] = []
        self.refuses = self.breaks = self.captures = False
        self.inspect: Callable[[int, int], None] = lambda address, num_bytes: None

    def register(self, address: int, num_bytes: int) -> None:
        self.inspect(address, num_bytes)
        if self.refuses:
            raise RefusedError
        assert address not in self.registered
        self.registered[address] = num_bytes
        self.history.append(("register", address))

    def unregister(self, address: int) -> None:
        self.open_when_unregistered.append(not host._mappings[address].closed)
        if self.breaks:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        del self.registered[address]
        self.history.append(("unregister", address))

    def capturing(self) -> bool:
        return self.captures


@pytest.fixture
def registrar(monkeypatch: pytest.MonkeyPatch) -> FakeRegistrar:
    """Stands for the registrar of every CUDA device."""
    fake = FakeRegistrar()
    monkeypatch.setattr(host, "CudaRegistrar", lambda device: fake)
    return fake


@pytest.fixture(autouse=True)
def maps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[mmap.mmap]]:
    """Every mapping made; all must be closed when a test ends, and nothing may have gone wrong in a finalizer."""
    made: list[mmap.mmap] = []
    unraisable: list[Any] = []
    real = host._map

    def recorded(num_bytes: int) -> mmap.mmap:
        made.append(real(num_bytes))
        return made[-1]

    monkeypatch.setattr(host, "_map", recorded)
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    yield made
    if host._mappings:
        gc.collect()  # a failed test's traceback, say
    assert [mapping.closed for mapping in made] == [True] * len(made)
    assert not host._mappings
    assert not host._dropped
    assert not unraisable


def smaps(address: int) -> tuple[int, set[str]]:
    """Resident bytes and flags of the mapping that holds `address`."""
    inside, resident = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("Rss:"):
            resident = int(line.split()[1]) * 1024
        elif inside and line.startswith("VmFlags:"):
            return resident, set(line.split()[1:])
    raise AssertionError("not mapped")


# -------------------------------------------------------------------------------------------------------------- slabs


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
@pytest.mark.parametrize("pages", [1, 512, 513, 20 * 512 + 1, 100 * 512])
def test_threads_touch_everything_once(monkeypatch: pytest.MonkeyPatch, pages: int, cpus: int) -> None:
    touched: list[tuple[int, int]] = []
    threads: set[int] = set()

    def memset(address: int, value: int, num_bytes: int) -> None:
        threads.add(threading.get_ident())
        touched.append((address, num_bytes))

    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    monkeypatch.setattr(ctypes, "memset", memset)
    host._touch(HUGE_PAGE, pages * PAGE)
    end = HUGE_PAGE
    for address, num_bytes in sorted(touched):
        assert address == end
        assert address % HUGE_PAGE == 0
        end = address + num_bytes
    assert end == HUGE_PAGE + pages * PAGE
    assert len(touched) <= min(16, cpus)
    assert len(threads) <= len(touched)
    if pages == 100 * 512:
        assert len(touched) >= min(16, cpus) * 0.8  # the work is spread


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
    assert not host._mappings
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
    thread = threading.Thread(target=lambda: HostSlab(PAGE, registrar), name=f"{host._THREAD_PREFIX}ahead")
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


PROCESS = """
import atexit, ctypes, gc, mmap, os, sys

@atexit.register  # before the package's own, so that it is called after that
def _late():
    assert not host.RESERVE._thread.is_alive(), "a thread may be in the driver"
    assert int(tensor.sum()) == 7 * tensor.numel()

import torch
from spin_hf.storage import host

class Registrar:
    calls = []
    def register(self, address, num_bytes):
        self.calls.append(address)
    def unregister(self, address):
        os.write(1, b"unregistered")
    def capturing(self):
        return False

reserve = host.RESERVE
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
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROCESS + end], capture_output=True, text=True, timeout=120, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# ------------------------------------------------------------------------------------------------------ calls to CUDA


class FakeRuntime:
    """torch.cuda.cudart(), as far as it is used."""

    cudaError = int  # noqa: N815

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.calls: list[tuple[Any, ...]] = []

    def cudaHostRegister(self, *arguments: int) -> int:  # noqa: N802
        self.calls.append(("register", *arguments))
        return self.code

    def cudaHostUnregister(self, *arguments: int) -> int:  # noqa: N802
        self.calls.append(("unregister", *arguments))
        return self.code

    def cudaGetErrorString(self, code: int) -> str:  # noqa: N802
        return {2: "out of memory", 712: "resource already mapped"}[code]

    def synchronize(self, device: torch.device) -> None:
        self.calls.append(("synchronize", device))

    def function(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.calls.append((name,))
            return 0

        return call


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    fake = FakeRuntime()
    monkeypatch.setattr(
        torch, "cuda", SimpleNamespace(cudart=lambda: fake, synchronize=fake.synchronize, device=nullcontext)
    )
    monkeypatch.setattr(host, "_runtime_function", fake.function)
    return fake


def test_registers_for_all_devices_and_mapped(runtime: FakeRuntime) -> None:
    CudaRegistrar(CUDA).register(4096, 8192)
    exchange = ("cudaThreadExchangeStreamCaptureMode",)
    assert runtime.calls == [exchange, ("register", 4096, 8192, 3), exchange]


@pytest.mark.parametrize(("code", "reason"), [(2, "out of memory"), (712, "resource already mapped")])
def test_refusal_says_what_and_what_to_do(runtime: FakeRuntime, code: int, reason: str) -> None:
    runtime.code = code
    with pytest.raises(CapacityError) as caught:
        CudaRegistrar(CUDA).register(4096, 3 << 30)
    for part in (str(3 << 30), "3.00 GiB", reason, str(code), "ulimit -l", "shorten the context"):
        assert part in str(caught.value)
    assert ("cudaGetLastError",) in runtime.calls


@pytest.mark.parametrize("code", [0, 712])
def test_waits_for_the_device_before_unregistering(runtime: FakeRuntime, code: int) -> None:
    runtime.code = code
    CudaRegistrar(CUDA).unregister(4096)
    calls = [call for call in runtime.calls if "Exchange" not in call[0]]
    assert calls[:2] == [("synchronize", CUDA), ("unregister", 4096)]
    assert calls[2:] == ([("cudaGetLastError",)] if code else [])


def test_runtime_function_that_is_not_there() -> None:
    assert host._runtime_function("cudaNoSuchFunction") is None
    with host._allowed_during_capture():
        host._clear_last_error()


# ------------------------------------------------------------------------------------------------------------- chunks


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


# ----------------------------------------------------------------------------------------------------- ahead of need


class Maker:
    """Stands for `allocate_rows`; makes a chunk only when it is let."""

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
def reserve(maker: Maker) -> Iterator[SlabReserve]:
    made = SlabReserve(maker)
    yield made
    for _ in range(100):
        maker.gate.release()
    made.stop()
    assert made._thread is None or not made._thread.is_alive()


def ask(reserve: SlabReserve, size: int = 3) -> Spare:
    return reserve.ask((size,), torch.float16, compute_device=CUDA)


def begun(maker: Maker) -> None:
    assert maker.begun.acquire(timeout=30)


def test_asking_does_not_wait_and_taking_does(reserve: SlabReserve, maker: Maker) -> None:
    spare = ask(reserve)
    begun(maker)
    assert not maker.made  # and yet `ask` has returned
    timer = threading.Timer(0.05, maker.gate.release)
    timer.start()
    chunk = spare.take()
    assert chunk is not None
    assert (chunk.shape, chunk.dtype) == ((3,), torch.float16)
    assert spare.take() is None


def test_one_thread_in_order_of_asking(reserve: SlabReserve, maker: Maker) -> None:
    spares = [ask(reserve, size) for size in range(1, 9)]
    for _ in spares:
        maker.gate.release()
    for _ in spares:
        begun(maker)
    chunks = [spare.take() for spare in spares]
    assert [chunk is not None and chunk.numel() for chunk in chunks] == list(range(1, 9))
    assert maker.made == [(size,) for size in range(1, 9)]
    assert len(set(maker.threads)) == 1
    assert maker.threads[0].daemon
    assert maker.threads[0] is not threading.current_thread()


def test_taking_before_the_making_begins_calls_it_off(reserve: SlabReserve, maker: Maker) -> None:
    first, second, third = ask(reserve, 1), ask(reserve, 2), ask(reserve, 3)
    begun(maker)
    assert second.take() is None  # does not wait for its turn
    for _ in range(3):
        maker.gate.release()
    begun(maker)
    assert third.take() is not None
    assert first.take() is not None
    assert maker.made == [(1,), (3,)]


def test_spares_of_arrays_that_died_are_not_made(reserve: SlabReserve, maker: Maker) -> None:
    first, second, third = ask(reserve, 1), ask(reserve, 2), ask(reserve, 3)
    begun(maker)
    del second
    for _ in range(3):
        maker.gate.release()
    begun(maker)
    assert first.take() is not None
    assert third.take() is not None
    assert maker.made == [(1,), (3,)]


def test_errors_stay_in_the_background(reserve: SlabReserve, maker: Maker) -> None:
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
    reserve = SlabReserve()
    spare = reserve.ask((3,), torch.float16, compute_device=CUDA)
    assert begun.wait(30)
    with spare._lock:  # until it is filled
        assert len(registrar.registered) == 1
    del spare
    reserve.stop()
    HostSlab(PAGE, registrar)  # gives back what the background thread was perhaps the last to hold
    assert [event for event, _ in registrar.history] == ["register", "unregister"] * 2


def test_thread_that_waits_keeps_no_spare(reserve: SlabReserve, maker: Maker) -> None:
    spare = ask(reserve)
    begun(maker)
    maker.gate.release()
    with spare._lock:  # until it is filled
        assert spare._chunk is not None
    gone = threading.Event()
    weakref.finalize(spare, gone.set)
    del spare
    assert gone.wait(30)


def test_reserve_that_was_stopped_leaves_it_to_the_foreground(reserve: SlabReserve, maker: Maker) -> None:
    reserve.stop()
    assert ask(reserve).take() is None
    assert not maker.threads
