"""What `update` handed out, and whether attention got the very same.

    keys, values = hand_out(layer, k, v)     views that carry their layer as Python attributes
    ...                                      the model may hand them on, to several attention calls and to other layers
    layer = owner(module, keys, values)      the layer whose pages serve the call; None for states of no paged layer

Pages hold what `update` was given. Keys or values that a model splits, repeats, rotates or overwrites in between are
others, and attention over the pages would be silently wrong: such a call is refused before it computes anything. The
attributes are on views, and not on the model's own tensors, so they end where an operation makes another tensor.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import AttentionError

LAYER_TAG = "_spin_layer"
VALUE_TAG = "_spin_values_of"
_VERSION = "_spin_version"


class Owner(Protocol):
    """What is asked of a layer here."""

    layer_idx: int
    cache_state: Any

    def take_pending(self) -> bool:
        """Whether `update` was called since the last attention; from now on it was not."""


class _Awaited(threading.local):
    """The layer that was updated last by this thread."""

    layer: weakref.ref[Any] | None = None


_awaited = _Awaited()


def hand_out(layer: Owner, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Views of new keys and values [B, H, n, D] that lead the attention function to `layer`."""
    keys, values = keys.view_as(keys), values.view_as(values)
    setattr(keys, LAYER_TAG, layer)
    setattr(values, VALUE_TAG, layer)
    if not torch.compiler.is_compiling():
        _awaited.layer = weakref.ref(layer)
        for states in (keys, values):
            setattr(states, _VERSION, _version(states))
    return keys, values


def owner(module: torch.nn.Module, keys: Tensor, values: Tensor) -> Any | None:
    """The layer that handed out these keys and values, or None if no paged layer did.

    Raises:
        AttentionError: they are not what a layer handed out, but made of it. The layer expects nothing any more.
    """
    layer, of_values = getattr(keys, LAYER_TAG, None), getattr(values, VALUE_TAG, None)
    if layer is not of_values:
        raise _changed(module, layer or of_values, "values" if of_values is None else "keys")
    if torch.compiler.is_compiling():
        return layer
    if layer is None:
        awaited = None if _awaited.layer is None else _awaited.layer()
        if awaited is not None and awaited.cache_state.pending is awaited:
            raise _changed(module, awaited, "keys and values")
        return None
    for name, states in (("keys", keys), ("values", values)):
        if _version(states) != getattr(states, _VERSION, None):
            raise _changed(module, layer, name)
    return layer


def forget() -> None:
    """A forward without a paged layer begins: what an interrupted one left open is none of its business."""
    _awaited.layer = None


def _version(states: Tensor) -> int | None:
    """How often a tensor was written to; not counted under `inference_mode`."""
    return None if states.is_inference() else states._version


def _changed(module: torch.nn.Module, layer: Any, which: str) -> AttentionError:
    layer.take_pending()
    return AttentionError(
        f"{layer.cache_state.model_name}, layer {layer.layer_idx}: {type(module).__name__} attends with {which} other than "
        "those that SpinCache.update returned (split, repeated, or changed in between), expected them handed on as they are; "
        "use a DynamicCache for this model"
    )
