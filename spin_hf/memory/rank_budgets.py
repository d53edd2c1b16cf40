"""Budgets that the ranks of a tensor-parallel model share: the smallest cap, and the fewest page frames, of all ranks.

    tier_budget   a new layer      the first one on a device sets the cap, from the GPU that has least memory
    agree         a growing cache  caps and frames that were set from the memory of one rank become those of all

Ranks with equal budgets keep the same pages on their GPUs, refuse the same batches, and capture the same steps.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..integration.rank_agreement import Ranks
from ..storage.tier_budget import TierBudget
from .gpu_memory import GpuMemory, Room
from .layer_budget import LayerShape

_NONE = 1 << 62
"""Stands for no cap, and for layers without frames."""


def tier_budget(
    gpu: GpuMemory, ranks: Ranks | None, shape: LayerShape, dtype: torch.dtype, device: torch.device, room: Room
) -> TierBudget:
    """`GpuMemory.tier_budget`, with the same cap on all ranks."""
    is_first = device not in gpu.caps
    budget = gpu.tier_budget(shape, dtype, device, room)
    if ranks is None or not is_first:
        return budget
    agree(gpu, ranks)
    return replace(budget, gpu_memory=gpu.caps[device])


def agree(gpu: GpuMemory, ranks: Ranks) -> None:
    """Lower caps and frames to the smallest of all ranks. Called by all ranks."""
    for device, cap in list(gpu.caps.items()):
        stores = [layer.store for layer in gpu.state.layers if layer.store is not None]
        frames = [store.num_frames for store in stores if store.frames is not None and store.num_frames]
        own = _NONE if cap is None else cap, min(frames, default=_NONE)
        least_cap, least_frames = ranks.smallest("agree on memory", *own)
        if least_cap < own[0]:
            gpu.short_of_frames()  # later checks try to grow them again
            gpu.resize(device, least_cap)
        if least_frames < max(frames, default=0):
            gpu.short_of_frames()
            for store in stores:
                store.budget = replace(store.budget, most_frames=least_frames)
            gpu.state.sequences.fit()
