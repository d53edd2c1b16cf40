"""What the machine can do: GPU memory and host link by large copies, and bursts of random pages read by the GPU itself.

    copy     GPU memory to GPU memory, read and written bytes counted
    link     page-locked host memory to GPU memory, 512 MiB at once, by the copy engine
    burst    4 KiB pages at random places of 1 GiB of the package's own host memory, read by a kernel through their
             addresses, as the cache loads what is missing

Every measurement starts behind a kernel that keeps the GPU busy for a while, so that the host's launches are not in it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from spin_hf.storage.host_register import CudaRegistrar
from spin_hf.storage.pinned_slab import HostSlab

PAGE_BYTES = 4096
BURSTS_MIB = (4, 16, 64)
_BUSY_CYCLES = 1_000_000
"""Half a millisecond."""


@triton.jit
def read_pages(address, pages, out, words: tl.constexpr):
    """Program i copies page `pages[i]` of `words` 8-byte words to the i-th place of `out`."""
    i = tl.program_id(0)
    source = tl.load(address).to(tl.pointer_type(tl.int64)) + tl.load(pages + i) * words
    places = tl.arange(0, words)
    tl.store(out + i.to(tl.int64) * words + places, tl.load(source + places))


def gpu_us(launch: Callable[[], object], before: Callable[[], object] | None = None, repeats: int = 15) -> list[float]:
    """Microseconds on the GPU of each of `repeats` launches; `before` runs ahead of each and is not timed."""
    took = []
    for _ in range(repeats):
        if before is not None:
            before()
        torch.cuda._sleep(_BUSY_CYCLES)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        launch()
        last.record()
        torch.cuda.synchronize()
        took.append(first.elapsed_time(last) * 1e3)
    return took


def copies() -> dict[str, float]:
    """GB/s of large copies."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / statistics.median(gpu_us(lambda: target.copy_(source)))
    host = HostSlab(512 << 20, CudaRegistrar(source.device)).tensor
    part = target[: len(host)]
    link = host.nbytes / statistics.median(gpu_us(lambda: part.copy_(host, non_blocking=True), repeats=7))
    return {"copy_gb_s": round(copy / 1e3, 1), "link_gb_s": round(link / 1e3, 2)}


def bursts() -> dict[str, float]:
    """GB/s of bursts of random pages, by their MiB."""
    device = torch.device("cuda", torch.cuda.current_device())
    host = HostSlab(1 << 30, CudaRegistrar(device)).tensor
    address = torch.tensor([host.data_ptr()], dtype=torch.int64, device=device)
    result = {}
    for mib in BURSTS_MIB:
        count = (mib << 20) // PAGE_BYTES
        out = torch.empty(count * PAGE_BYTES // 8, dtype=torch.int64, device=device)
        pages = torch.empty(count, dtype=torch.int64, device=device)

        def read(pages: torch.Tensor = pages, out: torch.Tensor = out) -> None:
            read_pages[(len(pages),)](address, pages, out, words=PAGE_BYTES // 8, num_warps=4)

        def others(pages: torch.Tensor = pages) -> None:
            pages.random_(0, host.nbytes // PAGE_BYTES)

        others()
        read()  # compiles
        took = statistics.median(gpu_us(read, before=others))
        result[f"{mib}_mib_gb_s"] = round(out.nbytes / took / 1e3, 2)
    return result
