"""Read-only attributes of transformers' cache layers, for paged layers: keys, values, dtype, device, batch size."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import CacheStateError
from ..storage.page_store import PageStore
from ..storage.read_only import read_only


class LayerViews:
    """Properties that are computed from a layer's pages."""

    layer_idx: int
    cache_state: Any
    state: Any

    @property
    def keys(self) -> Tensor | None:
        """All keys [B, H, tokens, Dk] in order, a read-only copy; None for an empty layer."""
        return self._dense(0)

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._refuse("keys")

    @property
    def values(self) -> Tensor | None:
        """All values [B, H, tokens, Dv] in order, a read-only copy; None for an empty layer."""
        return self._dense(1)

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._refuse("values")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values. AttributeError before the first token, as in transformers' layers."""
        return self._known("dtype").dtype

    @property
    def device(self) -> torch.device:
        """The device of the model's keys, where attention is computed. AttributeError before the first token."""
        return self._known("device").device

    @property
    def batch_size(self) -> int:
        """The number of sequences held. AttributeError before the first token, which transformers expects."""
        self.cache_state.settle()
        if self.state.store is None or not self.cache_state.sequences.batch_size:
            raise AttributeError("batch_size")
        return self.cache_state.sequences.batch_size

    def _known(self, name: str) -> PageStore:
        if self.state.store is None:
            raise AttributeError(name)
        return self.state.store

    def _refuse(self, name: str) -> NoReturn:
        raise CacheStateError(
            f"layer {self.layer_idx}: expected {name} of a SpinCache to be read only, got other ones; assign them in a "
            "DynamicCache and take that over with SpinCache.from_cache"
        )

    def _dense(self, which: int) -> Tensor | None:
        self.cache_state.settle()
        store, length = self.state.store, self.cache_state.committed
        if store is None or not length:
            return None
        return read_only(store.held(length)[which])
