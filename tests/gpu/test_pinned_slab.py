"""Host slabs on a CUDA machine: kernels read them in place, as fast as pinned memory, and CUDA stays usable."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from spin_hf.errors import CapacityError
from spin_hf.storage import pinned_slab
from spin_hf.storage.chunked_array import ChunkedArray
from spin_hf.storage.host_register import CudaRegistrar
from spin_hf.storage.pinned_slab import HostSlab, allocate_rows
from spin_hf.storage.slab_prefetch import SlabPrefetcher

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

CPU = torch.device("cpu")
MIB = 1 << 20


@triton.jit
def _gather(table, rows, out, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # noqa: N803
    row = tl.load(rows + tl.program_id(0))
    base = tl.load(table + row // ROWS).to(tl.pointer_type(tl.float32))
    columns = tl.arange(0, WIDTH)
    tl.store(out + tl.program_id(0) * WIDTH + columns, tl.load(base + (row % ROWS) * WIDTH + columns))


def gather(array: ChunkedArray, rows: torch.Tensor) -> torch.Tensor:
    """Rows of a float32 array, read by a kernel through the address table."""
    rows = rows.to(array.compute_device)
    (width,) = array.row_shape
    out = torch.empty((rows.numel(), width), device=rows.device)
    _gather[(rows.numel(),)](array.address_table, rows, out, ROWS=array.rows_per_chunk, WIDTH=width)
    return out


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def numbers(num_rows: int, width: int) -> torch.Tensor:
    return torch.arange(num_rows * width, dtype=torch.float32).view(num_rows, width)


def cuda_is_in_order(device: torch.device) -> bool:
    """Whether kernels run, and no error of before is reported."""
    ones = torch.ones(1000, device=device).add_(1)
    torch.cuda.synchronize(device)
    return float(ones.sum()) == 2000


def seconds(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


# -------------------------------------------------------------------------------------------------------------- slabs


@pytest.mark.parametrize("num_bytes", [1, 5000, 2 * MIB, 33 * MIB + 17])
def test_slab_is_pinned_and_survives_a_round_trip(cuda: torch.device, num_bytes: int) -> None:
    tensor = HostSlab(num_bytes, CudaRegistrar(cuda)).tensor
    assert tensor.is_pinned()
    assert tensor[-1:].is_pinned()
    expected = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)
    tensor.copy_(expected)
    on_gpu = tensor.to(cuda, non_blocking=True)
    assert torch.equal(on_gpu.cpu(), expected)
    tensor.zero_()
    tensor.copy_(on_gpu)
    assert torch.equal(tensor, expected)


def test_memory_is_given_back_after_the_kernels_that_read_it(cuda: torch.device) -> None:
    """The copy is queued after a long wait, and its source dropped at once."""
    tensor = HostSlab(16 * MIB, CudaRegistrar(cuda)).tensor.fill_(7)
    address = tensor.data_ptr()
    out = torch.zeros(16 * MIB, dtype=torch.uint8, device=cuda)
    torch.cuda.synchronize()
    torch.cuda._sleep(500_000_000)
    out.copy_(tensor, non_blocking=True)
    assert not torch.cuda.current_stream().query()
    del tensor
    assert address not in pinned_slab._mappings
    assert torch.cuda.current_stream().query()
    assert bool((out == 7).all())
    assert cuda_is_in_order(cuda)


def test_addresses_can_be_registered_again(cuda: torch.device) -> None:
    """They are mostly the same ones; CUDA would refuse one that is still registered."""
    held, places = set(pinned_slab._mappings), set()
    for size in (3 * MIB, 3 * MIB, 5 * MIB, 64 * MIB, 3 * MIB):
        slab = HostSlab(size, CudaRegistrar(cuda))
        places.add(slab.tensor.data_ptr())
        assert slab.tensor.is_pinned()
        del slab
    assert set(pinned_slab._mappings) <= held
    assert cuda_is_in_order(cuda)


def test_refusal_by_the_driver(cuda: torch.device) -> None:
    slab = HostSlab(4 * MIB, CudaRegistrar(cuda))
    with pytest.raises(CapacityError, match=rf"{4 * MIB} bytes .*already.*ulimit -l"):
        CudaRegistrar(cuda).register(slab.tensor.data_ptr(), 4 * MIB)
    assert cuda_is_in_order(cuda)
    assert slab.tensor.is_pinned()


class RefusesLater(CudaRegistrar):
    """The driver has enough after two pieces."""

    pieces = 0

    def register(self, address: int, num_bytes: int) -> None:
        self.pieces += 1
        if self.pieces == 3:
            raise CapacityError("refused")
        super().register(address, num_bytes)


def test_refusal_of_a_later_piece(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those before it are unlocked: the same addresses can be registered again."""
    monkeypatch.setattr(pinned_slab, "PIECE_BYTES", 4 * MIB)
    held = set(pinned_slab._mappings)
    for _ in range(3):
        with pytest.raises(CapacityError, match=f"got {8 * MIB} of them: refused"):
            HostSlab(20 * MIB, RefusesLater(cuda))
        assert set(pinned_slab._mappings) <= held
    assert HostSlab(20 * MIB, CudaRegistrar(cuda)).tensor.is_pinned()
    assert cuda_is_in_order(cuda)


def test_slab_of_several_pieces(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels read across their borders; CUDA copies what lies inside of a piece, at once and asynchronously."""
    monkeypatch.setattr(pinned_slab, "PIECE_BYTES", 4 * MIB)
    tensor = HostSlab(18 * MIB, CudaRegistrar(cuda)).tensor
    rows = numbers(18 * 1024, 256)
    tensor.copy_(rows.view(-1).view(torch.uint8))
    table, out = torch.tensor([tensor.data_ptr()], device=cuda), torch.empty_like(rows, device=cuda)
    _gather[(len(rows),)](table, torch.arange(len(rows), device=cuda), out, ROWS=1 << 30, WIDTH=256)
    assert torch.equal(out.cpu(), rows)
    target = torch.zeros_like(tensor, device=cuda)
    for to, source in zip(target.split(4 * MIB), tensor.split(4 * MIB), strict=True):
        assert source.is_pinned()
        to.copy_(source, non_blocking=True)
    assert torch.equal(target.cpu(), tensor)
    tensor.zero_()
    for to, source in zip(tensor.split(4 * MIB), target.split(4 * MIB), strict=True):
        to.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(tensor.view(torch.float32).view_as(rows), rows)
    address = tensor.data_ptr()
    del tensor, to
    assert address not in pinned_slab._mappings
    assert cuda_is_in_order(cuda)


def test_registering_while_another_thread_captures(cuda: torch.device) -> None:
    """In CUDA's strictest capture mode, which is torch's default."""
    source, out = torch.ones(8, device=cuda), torch.zeros(8, device=cuda)
    reserve, graph = SlabPrefetcher(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out.copy_(source * 3)
        chunk = reserve.ask((MIB,), torch.float32, compute_device=cuda)
        deadline = time.monotonic() + 30
        while chunk._chunks is None and time.monotonic() < deadline:
            time.sleep(0.01)
        out.add_(1)
    taken = chunk.take()
    reserve.stop()
    assert taken is not None
    assert taken[0].is_pinned()
    graph.replay()
    assert out.tolist() == [4.0] * 8


def test_dropping_a_slab_while_capturing(cuda: torch.device) -> None:
    source, out = torch.ones(8, device=cuda), torch.zeros(8, device=cuda)
    others = set(pinned_slab._mappings)
    slab, graph = HostSlab(MIB, CudaRegistrar(cuda)), torch.cuda.CUDAGraph()
    address = slab.tensor.data_ptr()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out.copy_(source * 3)
        del slab
        assert address in pinned_slab._mappings
    graph.replay()
    assert out.tolist() == [3.0] * 8
    again = HostSlab(2 * MIB, CudaRegistrar(cuda))
    assert set(pinned_slab._mappings) - others == {again.tensor.data_ptr()}


def test_process_ends_quietly() -> None:
    """With registered memory alive, spares under way and a kernel that still reads."""
    script = """
import torch
from spin_hf.storage.pinned_slab import allocate_rows
from spin_hf.storage.slab_prefetch import PREFETCHER
device = torch.device("cuda", 0)
chunks = allocate_rows(3, (1 << 20,), torch.float32, compute_device=device)
cycle = [allocate_rows(1, (1 << 20,), torch.float32, compute_device=device)]
cycle.append(cycle)
spares = [PREFETCHER.ask((1 << 24,), torch.float32, compute_device=device) for _ in range(8)]
torch.cuda._sleep(500_000_000)
copies = [chunk.to(device, non_blocking=True) for chunk in chunks]
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# ------------------------------------------------------------------------------------------------------------- arrays


def test_kernels_read_through_the_table(cuda: torch.device) -> None:
    """In the compute tier, after the move to the cpu tier, after growth, in a graph captured before all that."""
    array = ChunkedArray((16,), 8, torch.float32, cuda)
    array.grow(20)
    array.put(torch.arange(20), numbers(20, 16))
    table, place = array.address_table, array.address_table.data_ptr()
    rows = torch.tensor([19, 0, 8, 7, 3], device=cuda)
    assert torch.equal(gather(array, rows).cpu(), numbers(20, 16)[rows.cpu()])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gather(array, rows)
    array.move(CPU)
    assert all(chunk.is_pinned() for chunk in array.chunks)
    graph.replay()
    assert torch.equal(out.cpu(), numbers(20, 16)[rows.cpu()])
    for num_rows in range(21, 60):
        array.grow(num_rows)
        array.put(torch.arange(num_rows - 1, num_rows), numbers(num_rows, 16)[-1:])
    assert all(chunk.is_pinned() for chunk in array.chunks)
    rows.copy_(torch.tensor([58, 0, 24, 31, 40]))
    graph.replay()
    assert torch.equal(out.cpu(), numbers(60, 16)[rows.cpu()])
    assert array.address_table is table
    assert table.data_ptr() == place
    twin = deepcopy(array)
    assert all(chunk.is_pinned() for chunk in twin.chunks)
    array.put(torch.arange(59), torch.zeros(59, 16))
    assert torch.equal(gather(twin, torch.arange(59)).cpu(), numbers(59, 16))
    twin.move(cuda)
    assert torch.equal(gather(twin, torch.arange(59)).cpu(), numbers(59, 16))


def test_array_of_several_pieces(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """No chunk lies in two pieces (three to a piece here), so an array moves, is copied and read as ever."""
    monkeypatch.setattr(pinned_slab, "PIECE_BYTES", 5 * MIB)
    array = ChunkedArray((256,), 1536, torch.float32, cuda)
    values, rows = numbers(20 * 1536, 256), torch.arange(20 * 1536)
    array.grow(len(rows))
    array.put(rows, values)
    array.move(CPU)
    assert all(chunk.is_pinned() and chunk[-1:].is_pinned() for chunk in array.chunks)
    assert torch.equal(gather(array, rows).cpu(), values)
    assert torch.equal(array.take(rows.to(cuda)).cpu(), values)
    twin = deepcopy(array)
    array.put(rows, -values)
    assert torch.equal(gather(array, rows).cpu(), -values)
    twin.move(cuda)
    assert torch.equal(gather(twin, rows).cpu(), values)
    assert cuda_is_in_order(cuda)


# ------------------------------------------------------------------------------------------------------------- speed


def test_report_speed(cuda: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints what memory costs; nothing is asserted of times, which depend on the machine."""
    torch.empty(MIB, pin_memory=True)
    made: list[torch.Tensor] = []
    num_bytes = 1 << 30
    slab = seconds(lambda: made.append(HostSlab(num_bytes, CudaRegistrar(cuda)).tensor))
    pinned = seconds(lambda: made.append(torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)))
    target = torch.empty(num_bytes, dtype=torch.uint8, device=cuda)
    rates = [num_bytes / seconds(lambda s=s: _copy(target, s)) / 1e9 for s in made]
    one = seconds(lambda: made.extend(allocate_rows(1, (64 * MIB,), torch.uint8, compute_device=cuda)))
    give_back = seconds(lambda: made.pop(0))
    longest = _longest_pause(lambda: made.extend(allocate_rows(4, (256 * MIB,), torch.uint8, compute_device=cuda)))
    with capsys.disabled():
        print(
            f"\n1 GiB: slab {slab:.3f} s, pin_memory {pinned:.3f} s; copied to the GPU at {rates[0]:.1f} and "
            f"{rates[1]:.1f} GB/s; given back in {give_back:.3f} s; 64 MiB chunk {one * 1e3:.1f} ms; while 1 GiB is "
            f"made in the background, Python waits at most {longest * 1e3:.1f} ms at a time"
        )
    assert made


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Piece by piece, as a slab must be."""
    for to, part in zip(target.split(pinned_slab.PIECE_BYTES), source.split(pinned_slab.PIECE_BYTES), strict=True):
        to.copy_(part, non_blocking=True)


def _longest_pause(work: Callable[[], object]) -> float:
    """The longest time in seconds for which this thread could not run while another did `work`: does it hold the GIL?"""
    thread = threading.Thread(target=work)
    thread.start()
    longest, last = 0.0, time.perf_counter()
    while thread.is_alive():
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest
