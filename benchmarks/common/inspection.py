"""What benchmarks read of a cache in addition to `stats()`, by the public attributes of its paged layers.

They are not part of the stable interface. All benchmarks read them here, so that only this file has to follow a change.
"""

from __future__ import annotations

from spin_hf import SpinCache
from spin_hf.forward_pass import ForwardPass
from spin_hf.state import CacheState


def state_of(cache: SpinCache) -> CacheState:
    """State that the paged layers of a cache share: page table, padding, method and options."""
    return cache.paged_layers[0].cache_state


def forward_of(cache: SpinCache) -> ForwardPass:
    """Forwards of a cache over its paged layers."""
    return cache.paged_layers[0].forward


def counted_by_kernels(cache: SpinCache) -> dict[str, int]:
    """Counters of the kernels, by the names of `Counter`. Reads the device."""
    return forward_of(cache).backends.counted()
