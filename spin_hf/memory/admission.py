"""Whether the first tokens of a batch may come: said when the mask is made, before the model computes anything.

    layers with pages, of a batch that was there before    their budgets say
    layers without                                         budgets foreseen by the model's or config's dtype and heads

What is foreseen has to be certain, as a refusal must never be one too many; where it is not, a layer judges when its first
keys come. Tokens that come later are judged by the layers (`PageTable.check_room`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..integration.layer_types import decoder_config
from ..state import CacheState
from ..storage.tier_budget import TierBudget, check_all
from .gpu_memory import GpuMemory
from .layer_budget import LayerShape, layer_shapes


def check_first_batch(state: CacheState, gpu: GpuMemory, num_tokens: int, batch_size: int) -> None:
    """Refuse the first tokens of a batch if the caps do not hold them.

    Args:
        gpu: the caps.
        num_tokens: of each sequence.
    Raises:
        BudgetError, CapacityError: nothing has changed.
    """
    sequences = state.sequences
    room = sequences.first_room(batch_size, num_tokens)
    for store in sequences.stores:
        store.check(*room)
    if len(sequences.stores) < len(state.layers):
        check_all(_budgets(state, gpu, room), *room)


def _budgets(state: CacheState, gpu: GpuMemory, room: tuple[int, int, int]) -> set[TierBudget]:
    """Of the layers, as far as they are certain; none where there is no cap, or it is not known yet."""
    if state.options.gpu_memory is None and not torch.cuda.is_available():
        return set()
    served = None if state.served is None else state.served()
    seen = None if served is None else foresee(served, [layer.layer_idx for layer in state.layers])
    if seen is None or (seen.device is None and state.options.gpu_memory is None):
        return set()
    device = torch.device("cpu") if seen.device is None else seen.device  # an explicit cap is the same on all
    return {gpu.tier_budget(shape, seen.dtype, device, room) for shape in seen.shapes}


@dataclass(frozen=True)
class Foreseen:
    """What the states of the next forward will be like, in all paged layers.

    Attributes:
        shapes: of the layers.
        dtype: of keys and values.
        device: of the layers; None where that is not known.
    """

    shapes: list[LayerShape]
    dtype: torch.dtype
    device: torch.device | None


def foresee(served: Any, layers: list[int]) -> Foreseen | None:
    """What the next forward's states will be like; None where the config and the parameters leave a doubt.

    Left out are parallel ranks, which may have a part of the heads each, and what may compute in another dtype than the one
    that is written down.

    Args:
        served: the model, or its config.
        layers: the paged layers' numbers.
    """
    config, _ = decoder_config(served)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return None
    shapes = layer_shapes(config, layers)
    if shapes is None:
        return None
    if not isinstance(served, nn.Module):
        written = getattr(config, "dtype", None)
        if isinstance(written, torch.dtype) and written.itemsize == 2:  # none is smaller
            return Foreseen(shapes, written, None)
        return None
    parameters = [parameter for parameter in served.parameters() if parameter.is_floating_point()]
    dtypes = {parameter.dtype for parameter in parameters if parameter.dtype.itemsize >= 2}
    devices = {parameter.device for parameter in parameters}
    if not dtypes:
        return None
    dtype = min(dtypes, key=lambda dtype: dtype.itemsize)  # some norms and routers have more bits
    device = devices.pop() if len(devices) == 1 else None
    if dtype.itemsize > 2 and (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
        return None
    return Foreseen(shapes, dtype, device)
