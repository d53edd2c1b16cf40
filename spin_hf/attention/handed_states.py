"""Tags the keys and values that `update` returns, and checks that attention receives the same ones. Tags outputs of attention.

    keys, values = hand_out(layer, k, v)     views that carry their layer as Python attributes
    ...                                      the model may pass them to several attention calls and to other layers
    layer = owner(module, keys, values)      the layer with the pages for this call; None for states of no paged layer

Pages store what `update` received. If a model splits, repeats, rotates or overwrites keys or values after that, attention over
the pages would be silently wrong. Such a call raises before it computes anything. The attributes are on views, not on the
model's own tensors, so every operation that makes a new tensor drops them.

An output that `spin_attention` has just allocated, and that nobody has a view of, may take over the memory of a result instead
of getting a copy. Compiled code plans its memory, so outputs are not tagged there.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import AttentionError

LAYER_TAG = "_spin_layer"
VALUE_TAG = "_spin_values_of"
_VERSION = "_spin_version"
_FRESH = "_spin_fresh"


class Owner(Protocol):
    """A layer, as far as this module uses it."""

    layer_idx: int
    cache_state: Any

    def take_pending(self) -> bool:
        """Whether `update` was called since the last attention. Clears the flag."""


class _LastUpdated(threading.local):
    """The layer that this thread updated last."""

    layer: weakref.ref[Any] | None = None


_last_updated = _LastUpdated()


def hand_out(layer: Owner, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Views of new keys and values [B, H, n, D] that lead the attention function to `layer`."""
    keys, values = keys.view_as(keys), values.view_as(values)
    setattr(keys, LAYER_TAG, layer)
    setattr(values, VALUE_TAG, layer)
    if not torch.compiler.is_compiling():
        _last_updated.layer = weakref.ref(layer)
        for states in (keys, values):
            setattr(states, _VERSION, _version(states))
    return keys, values


def owner(module: torch.nn.Module, keys: Tensor, values: Tensor) -> Any | None:
    """The layer that handed out these keys and values; None if no paged layer did.

    Raises:
        AttentionError: they were changed or derived since a layer handed them out. Clears the layer's pending flag.
    """
    layer, of_values = getattr(keys, LAYER_TAG, None), getattr(values, VALUE_TAG, None)
    if layer is not of_values:
        raise _changed(module, layer or of_values, "values" if of_values is None else "keys")
    if torch.compiler.is_compiling():
        return layer
    if layer is None:
        last = None if _last_updated.layer is None else _last_updated.layer()
        if last is not None and last.cache_state.pending is last:
            raise _changed(module, last, "keys and values")
        return None
    for name, states in (("keys", keys), ("values", values)):
        if _version(states) != getattr(states, _VERSION, None):
            raise _changed(module, layer, name)
    return layer


def fresh_output(query: Tensor, value: Tensor) -> Tensor:
    """Memory for the output of attention, [B, Q, heads, Dv], in the query's dtype."""
    out = torch.empty(
        (query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), dtype=query.dtype, device=query.device
    )
    if not torch.compiler.is_compiling():
        setattr(out, _FRESH, True)
    return out


def take_over(out: Tensor, result: Tensor) -> bool:
    """Let an output have the memory of `result`, if it is one of `fresh_output` and has that layout. Returns whether it has.

    Nobody else may write to `result`.
    """
    if not getattr(out, _FRESH, False) or result.dtype != out.dtype or not result.is_contiguous():
        return False
    setattr(out, _FRESH, False)
    same = out.is_inference() == torch.is_inference_mode_enabled()
    with nullcontext() if same else torch.inference_mode(out.is_inference()):
        out.set_(result.untyped_storage(), result.storage_offset(), result.shape, result.stride())
    return True


def forget() -> None:
    """Called when a forward without paged layers begins: forget the layer that an interrupted forward updated."""
    _last_updated.layer = None


def _version(states: Tensor) -> int | None:
    """The number of in-place writes to a tensor; None under `inference_mode`, which does not count them."""
    return None if states.is_inference() else states._version


def _changed(module: torch.nn.Module, layer: Any, which: str) -> AttentionError:
    layer.take_pending()
    return AttentionError(
        f"{layer.cache_state.model_name}, layer {layer.layer_idx}: {type(module).__name__} attends with {which} other than "
        "those that SpinCache.update returned (split, repeated, or changed in between), expected them handed on as they are; "
        "use a DynamicCache for this model"
    )
