"""One cap in bytes, divided among caches that come and go.

shares    each cache its minimum, and of the rest a part in proportion to what it lacks to hold all pages
pressure  a new cache makes the shares of the others smaller: they give back buffer pages, never those of a step
"""

from __future__ import annotations

from collections.abc import Sequence

from .gpu_memory import GpuMemory
from .request_needs import RequestNeeds


def shares(cap: int, needs: Sequence[RequestNeeds]) -> list[int]:
    """Bytes for each cache. Their sum is at most `cap`, unless the minima exceed it: then each gets its part of the cap."""
    least = sum(each.minimum for each in needs)
    if least > cap:
        return [max(1, cap * each.minimum // max(1, least)) for each in needs]
    lacking = sum(each.resident - each.minimum for each in needs)
    spare = min(cap - least, lacking)
    return [
        max(1, each.minimum + (spare * (each.resident - each.minimum) // lacking if lacking else 0)) for each in needs
    ]


def set_cap(gpu: GpuMemory, num_bytes: int) -> None:
    """Replace the cap in bytes of one cache. A smaller one takes buffer pages now; frames grow at a later step."""
    if gpu.given == num_bytes:
        return
    gpu.given = num_bytes
    for device in list(gpu.caps):
        held = gpu.held(device)
        if held > num_bytes:
            gpu.give_back(held - num_bytes)
    gpu.short_of_frames()
