"""Watermarks: GPU memory that a cache with `gpu_memory="auto"` may hold, computed from free memory.

    pool = bytes held by the cache + bytes free;  margin = a tenth of the pool

    free    0 ........ margin / 2 ........ margin ........ 2 * margin ........
              below: shrink           left free by           above: grow
              until margin is free    decode steps           until margin is free

Between the two watermarks nothing changes, so small changes in free memory do not resize the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_HELD = ("reserved_bytes", "allocated_bytes")
MARGIN_FRACTION = 0.1
"""Fraction of the pool that decode steps leave free for activations. A prefill leaves twice as much."""


@dataclass(frozen=True)
class Watermarks:
    """Caps and watermarks of a cache that holds `held` bytes while `free` bytes are free.

    Attributes:
        margin_bytes: smallest margin, but at most a fifth of the pool.
    """

    margin_bytes: int

    def margin(self, pool: int) -> int:
        """Bytes to leave free of a pool."""
        return max(int(pool * MARGIN_FRACTION), min(self.margin_bytes, pool // 5))

    def cap_for_prompts(self, held: int, free: int) -> int:
        """The cap during a prefill: leaves two margins free, for its larger activations."""
        return max(1, held + free - 2 * self.margin(held + free))

    def cap_for_decoding(self, held: int, free: int) -> int:
        """The cap during decoding: leaves one margin free."""
        return max(1, held + free - self.margin(held + free))

    def is_low(self, held: int, free: int) -> bool:
        """Whether free memory is below the low watermark, so that the cache must shrink."""
        return 2 * free < self.margin(held + free)

    def is_ample(self, held: int, free: int) -> bool:
        """Whether free memory is above the high watermark, so that the cache may grow."""
        return free > 2 * self.margin(held + free)


def free_gpu_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on a GPU, including memory cached by torch's allocator; None for other devices.

    Respects `torch.cuda.set_per_process_memory_fraction`.
    """
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    free, total = torch.cuda.mem_get_info(index)
    held = torch.cuda.memory_stats_as_nested_dict(
        index
    )  # read once; `memory_reserved` and others make a list of it all
    reserved, allocated = (held.get(name, {}).get("all", {}).get("current", 0) for name in _HELD)
    fraction = torch.cuda.get_per_process_memory_fraction(index)
    if fraction < 1:
        free = max(0, min(free, int(fraction * total) - reserved))
    return int(free + reserved - allocated)


def fair_share(wanted: int, available: int, others: int) -> int:
    """Bytes that a cache may request: its part of `available`, in proportion to unpaged sizes. At most `wanted`.

    Args:
        wanted: bytes of this cache with all pages in the compute tier.
        available: bytes free, plus bytes that other caches can give back.
        others: sum of `wanted` of the other caches.
    """
    return min(wanted, available * wanted // max(1, wanted + others))


def split_fairly(missing: int, givable: list[int]) -> list[int]:
    """Split `missing` bytes among caches in proportion to the bytes each can give. None gives more than it can."""
    total = sum(givable)
    return [min(each, -(-missing * each // total)) if total else 0 for each in givable]
