"""Checks new keys and values against a layer's pages and the cache's batch size."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..errors import AttentionError
from ..state import CacheState, LayerState
from ..storage.page_store import PageStore


def can_take(state: CacheState, layer: LayerState, key: Tensor, value: Tensor) -> bool:
    """Whether a layer's pages can store keys and values; False if the cache is empty and must allocate other pages.

    Args:
        key, value: [B, H, n, Dk] and [B, H, n, Dv].
    Raises:
        AttentionError: heads, head sizes, dtype or device differ. Nothing has changed.
    """
    store = layer.store
    if store is None or _shape_of(store) == _shape_given(key, value):
        return True
    if not state.committed and not state.sequences.length:
        return False
    raise AttentionError(
        f"layer {layer.layer_idx} holds (heads, key size, value size, dtype, device) {_shape_of(store)}, got "
        f"{_shape_given(key, value)}; "
        "run the model as it was when the cache was filled (dtype, autocast, device), or call cache.reset()"
    )


def held_batch(state: CacheState, layers: list[Any]) -> int | None:
    """Number of sequences held, from the first layer that has tokens; None if the cache is empty."""
    if state.layers:
        return state.sequences.batch_size if state.committed else None
    for layer in layers:
        if isinstance(layer, CacheLayerMixin) and layer.is_initialized and layer.get_seq_length():
            return layer.keys.shape[0]  # type: ignore[no-any-return, unused-ignore]
    return None


def _shape_of(store: PageStore) -> tuple[object, ...]:
    return store.num_heads, store.key_dim, store.value_dim, store.dtype, store.device


def _shape_given(key: Tensor, value: Tensor) -> tuple[object, ...]:
    return key.shape[1], key.shape[3], value.shape[3], key.dtype, key.device
