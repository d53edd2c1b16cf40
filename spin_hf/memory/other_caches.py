"""Memory of a GPU that caches with `gpu_memory="auto"` share: which of them give back memory for another one.

    a cache requests   room for all of its pages, if that is at most half of what is free or can be given back; else its share,
                       in proportion to sizes
    it gets, first     buffer pages of caches whose pages are in host memory, in proportion to what each can give
             then      caches whose pages are on the GPU move to host memory, one by one: the smallest that suffices, else the
                       largest; of equal ones the one that was used longest ago

Moving takes long, moves all pages of a cache, and there is no way back, so few caches move. Every cache keeps the frames of one
step. A cache that is inside a step, or used by another live thread, is not changed from outside; it reclaims at its next step.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import ExitStack
from typing import Any, Protocol

import torch

from ..state import CacheState, Phase
from ..storage.page_store import PageStore
from . import watermarks
from .shared_pages import own_bytes, share_pages


class Memory(Protocol):
    """Memory of one cache, which `GpuMemory` documents."""

    given: int | None
    watermarks: watermarks.Watermarks
    owner: int
    used: int
    streams: dict[torch.device, Any]
    pending_reclaim: dict[torch.device, int]

    @property
    def state(self) -> CacheState: ...
    def stores_on(self, device: torch.device) -> list[PageStore]: ...
    def is_paged(self, device: torch.device) -> bool: ...
    def held(self, device: torch.device) -> int: ...
    def least(self, stores: list[PageStore]) -> int: ...
    def resident_bytes(self, device: torch.device) -> int: ...
    def give_back_of(self, device: torch.device, num_bytes: int | None) -> int: ...


live: weakref.WeakSet[Memory] = weakref.WeakSet()
"""Instances with `gpu_memory="auto"`, which share devices."""
lock = threading.RLock()
"""Held while another cache's frames are changed, and while a cache changes its thread."""


def request_memory(one: Memory, device: torch.device, wanted: int, least: int) -> None:
    """Request what a cache lacks from others.

    Args:
        wanted: bytes with all of its pages on the device.
        least: bytes with the frames of one step.
    """
    others = _others(one, device)
    free = watermarks.free_gpu_memory(device) if others else None
    if free is None:
        return
    cap = one.watermarks.cap_for_prompts(one.held(device), free)
    if wanted <= cap:
        return
    if one.given is None:
        available = cap + sum(_givable(other, device) for other in others)
        if 2 * wanted > available:
            of_others = sum(other.resident_bytes(device) for other in others)
            wanted = max(least, watermarks.fair_share(wanted, available, of_others))
    if wanted > cap:
        request_bytes(one, device, wanted - cap)


def request_bytes(one: Memory, device: torch.device, missing: int) -> None:
    """Request bytes of a device from the other caches on it."""
    with lock:
        others = _others(one, device)
        missing = missing * 5 // 4  # a quarter more, as a margin of the freed memory stays free
        paged = [other for other in others if other.is_paged(device)]
        quotas = watermarks.split_fairly(missing, [_givable(other, device) for other in paged])
        for other, quota in zip(paged, quotas, strict=True):
            missing -= _given(other, device, quota)
        sizes = {other: size for other in others if other not in paged and (size := _givable(other, device))}
        while missing > 0 and sizes:
            size = min((size for size in sizes.values() if size >= missing), default=max(sizes.values()))
            other = min((each for each in sizes if sizes[each] == size), key=lambda each: each.used)
            del sizes[other]
            missing -= _given(other, device, min(missing, size))


def _given(other: Memory, device: torch.device, num_bytes: int) -> int:
    """Have a cache give back bytes, now or at its next step. Returns how many."""
    if not num_bytes:
        return 0
    if not _may_be_changed(other):
        other.pending_reclaim[device] = max(num_bytes, other.pending_reclaim.get(device, 0))
        return num_bytes
    with ExitStack() as stack:
        if device.type == "cuda":  # ordered with its kernels
            stack.enter_context(torch.cuda.stream(other.streams.get(device)))
        return other.give_back_of(device, num_bytes)


def _givable(one: Memory, device: torch.device) -> int:
    """Bytes that a cache can give back."""
    stores = one.stores_on(device)
    if not stores or not one.state.sequences.length:
        return own_bytes(stores)
    return 0 if share_pages(stores) else max(0, one.held(device) - one.least(stores))


def _may_be_changed(one: Memory) -> bool:
    alive = any(thread.ident == one.owner for thread in threading.enumerate())
    return one.state.phase is Phase.IDLE and (one.owner == threading.get_ident() or not alive)


def _others(one: Memory, device: torch.device) -> list[Memory]:
    """Other caches with memory on a device."""
    with lock:
        return [other for other in list(live) if other is not one and other.stores_on(device)]
