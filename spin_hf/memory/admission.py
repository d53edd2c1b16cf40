"""Admission control: rejects a new batch that exceeds the memory caps, when its mask is built and before any layer runs.

    layers with pages from an earlier batch    checked against their budgets
    other layers                               checked against budgets from the dtype and heads of the model or config

A prediction is used only if it is certain, so that no batch is rejected that would fit. Otherwise a layer checks when it gets
its first keys. Later tokens are checked by the layers (`PageTable.check_room`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import BudgetError, CapacityError
from ..integration.layer_types import decoder_config
from ..state import CacheState
from ..storage.tier_budget import TierBudget, check_all
from .gpu_memory import GpuMemory
from .layer_budget import LayerShape, layer_shapes
from .layer_places import places


def check_first_batch(state: CacheState, gpu: GpuMemory, num_tokens: int, batch_size: int) -> None:
    """Reject the first tokens of a batch if they exceed the caps.

    Args:
        gpu: the caps.
        num_tokens: tokens of each sequence.
    Raises:
        BudgetError, CapacityError: a cap is exceeded. Nothing has changed.
    """
    sequences = state.sequences
    room = sequences.first_room(batch_size, num_tokens)
    for store in sequences.stores:
        store.check(*room)
    if len(sequences.stores) < len(state.layers):
        try:
            check_all(_certain_budgets(state, gpu, room), *room)
        except (BudgetError, CapacityError):
            gpu.forget_caps()
            raise


def _certain_budgets(state: CacheState, gpu: GpuMemory, room: tuple[int, int, int]) -> set[TierBudget]:
    """Budgets of the layers, if they are certain. Empty if there is no cap, or none known yet."""
    if state.options.gpu_memory is None and not torch.cuda.is_available():
        return set()
    model_or_config = None if state.model_or_config is None else state.model_or_config()
    layers = [layer.layer_idx for layer in state.layers]
    predicted = None if model_or_config is None else predict_states(model_or_config, layers)
    devices = places(state)
    if predicted is None or (devices is None and state.options.gpu_memory is None):
        return set()
    if devices is None:
        devices = [torch.device("cpu")] * len(layers)  # a cap in bytes is the same on all
    return {
        gpu.tier_budget(shape, predicted.dtype, device, room)
        for shape, device in zip(predicted.shapes, devices, strict=True)
    }


@dataclass(frozen=True)
class PredictedStates:
    """Shapes and dtype of the next forward's keys and values in all paged layers.

    Attributes:
        shapes: of the layers.
        dtype: of keys and values.
    """

    shapes: list[LayerShape]
    dtype: torch.dtype


def predict_states(model_or_config: Any, layers: list[int]) -> PredictedStates | None:
    """Predict the next forward's keys and values. None if config and parameters do not determine them.

    That is so under torch.distributed, where a rank may hold only some of the heads, and if the model may compute in another
    dtype than the declared one.

    Args:
        model_or_config: the model, or its config.
        layers: indices of the paged layers.
    """
    config, _ = decoder_config(model_or_config)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return None
    shapes = layer_shapes(config, layers)
    if shapes is None:
        return None
    if not isinstance(model_or_config, nn.Module):
        declared = getattr(config, "dtype", None)
        if isinstance(declared, torch.dtype) and declared.itemsize == 2:  # the smallest possible size
            return PredictedStates(shapes, declared)
        return None
    dtype = _narrowest(model_or_config)  # some norms and routers have a wider dtype
    if dtype is None:
        return None
    if dtype.itemsize > 2 and (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
        return None
    return PredictedStates(shapes, dtype)


def _narrowest(model: nn.Module) -> torch.dtype | None:
    """The smallest floating dtype of the parameters, of two bytes at least; None if there is none.

    Looks no further than the first of two bytes: this is asked before every prompt.
    """
    found: torch.dtype | None = None
    for parameter in model.parameters():
        dtype = parameter.dtype
        if dtype.is_floating_point and dtype.itemsize >= 2 and (found is None or dtype.itemsize < found.itemsize):
            found = dtype
            if dtype.itemsize == 2:
                break
    return found
