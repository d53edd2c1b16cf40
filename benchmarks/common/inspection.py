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


def num_clustered_pages(cache: SpinCache) -> int:
    """Pages of a sequence in spans whose tokens are clustered."""
    return state_of(cache).sequences.spans.num_pages


def num_segments(cache: SpinCache) -> int:
    """Segments of pages that sequences use."""
    return state_of(cache).sequences.segments_in_use


def num_graphs(cache: SpinCache) -> int:
    """Calls that have run once, and those that were captured behind it. Grows in slow first steps; 0 without a GPU."""
    steps = cache.calls.steps
    return sum(1 if graph is None else 2 for graph in steps.captured.values()) if steps else 0
