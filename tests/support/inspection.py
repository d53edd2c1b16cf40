"""What tests read of a cache in addition to `stats()`, by the public attributes of its paged layers.

They are not part of the stable interface. All tests read them here, so that only this file has to follow a change.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from spin_hf import SpinCache
from spin_hf.backends.triton_step import StepKernels
from spin_hf.forward_pass import ForwardPass
from spin_hf.layer import SpinLayer
from spin_hf.state import CacheState


def state_of(cache: SpinCache) -> CacheState:
    """State that the paged layers of a cache share: page table, padding, method and options."""
    return cache.paged_layers[0].cache_state


def forward_of(cache: SpinCache) -> ForwardPass:
    """Forwards of a cache over its paged layers."""
    return cache.paged_layers[0].forward


def kernels_of(cache: SpinCache) -> list[StepKernels]:
    """Kernels that serve a cache; none if the reference backend does."""
    return forward_of(cache).backends.in_use()


def counted_by_kernels(cache: SpinCache) -> dict[str, int]:
    """Counters of the kernels, by the names of `Counter`. `stats()` adds those of the reference backend."""
    return forward_of(cache).backends.counted()


def unpaged_layers(cache: SpinCache) -> list[Any]:
    """The layers without pages, such as those of sliding windows."""
    return [layer for layer in cache.layers if not isinstance(layer, SpinLayer)]


def lower_cap(cache: SpinCache, num_bytes: int) -> None:
    """Let the next step find a cap of `num_bytes` on the compute tier, as if other processes had taken the rest."""
    for layer in cache.paged_layers:
        assert layer.store is not None
        layer.store.budget = replace(layer.store.budget, gpu_memory=num_bytes)
    state_of(cache).sequences._become()
