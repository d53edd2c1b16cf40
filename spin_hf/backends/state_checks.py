"""Whether new keys and values are of the form that a layer's pages have, and of the batch that a cache holds."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..errors import AttentionError, CacheStateError
from ..state import SharedState
from ..storage.page_store import PageStore
from ..transaction import finished


def check_states(shared: SharedState, number: int, layer_idx: int, key: Tensor, value: Tensor) -> None:
    """Raise where a layer's pages cannot take keys and values. An empty cache makes other pages then.

    Args:
        number: of the layer, among the paged ones.
        layer_idx: of the layer, in the model.
        key, value: [B, H, n, Dk] and [B, H, n, Dv].
    Raises:
        AttentionError: heads, their sizes, dtype or device differ. Nothing has changed.
    """
    store = shared.layers[number].store
    if store is None or _form(store) == _given(key, value):
        return
    if not shared.committed and not shared.sequences.length:
        finished(shared, shared.forget_stores)
        return
    raise AttentionError(
        f"layer {layer_idx} holds (heads, key size, value size, dtype, device) {_form(store)}, got {_given(key, value)}; run "
        "the model as it was when the cache was filled (dtype, autocast, device), or call cache.reset()"
    )


def check_layer(index: int, layers: list[Any], shared: SharedState) -> None:
    """Raise CacheStateError where a model has a layer that the cache has not. What its forward has appended is taken back.

    Args:
        index: of the layer that comes.
        layers: of the cache.
    """
    if index < len(layers):
        return
    if shared.committed == shared.sequences.length:
        shared.committed = shared.sequences.start  # the last layer of the cache was not the model's last
        shared.roll_back()
    raise CacheStateError(
        f"the cache has {len(layers)} layers, as {shared.model_name} has, got layer {index} of a model that has more; make a "
        "SpinCache of the model that uses it"
    )


def held_batch(shared: SharedState, layers: list[Any]) -> int | None:
    """Sequences held, by whichever layer says so; None while empty."""
    if shared.layers:
        return shared.sequences.batch_size if shared.committed else None
    for layer in layers:
        if isinstance(layer, CacheLayerMixin) and layer.is_initialized and layer.get_seq_length():
            return layer.keys.shape[0]  # type: ignore[no-any-return, unused-ignore]
    return None


def _form(store: PageStore) -> tuple[object, ...]:
    return store.num_heads, store.key_dim, store.value_dim, store.dtype, store.device


def _given(key: Tensor, value: Tensor) -> tuple[object, ...]:
    return key.shape[1], key.shape[3], value.shape[3], key.dtype, key.device
