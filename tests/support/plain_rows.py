"""PageTable as plain tensors, which say what a cache of the tiny shape must hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.support.cache_driver import Shape

SHAPE = Shape(layers=2, kv_heads=2, group=2, key_dim=4, value_dim=3)


@dataclass(frozen=True)
class Row:
    """One sequence: keys [layers, H, n, Dk], values [layers, H, n, Dv], is_real [n]. Never changed in place."""

    keys: Tensor
    values: Tensor
    is_real: Tensor

    def __len__(self) -> int:
        return self.is_real.shape[0]

    def followed_by(self, keys: Tensor, values: Tensor, is_real: Tensor) -> Row:
        """With more tokens; `is_real` is for all of them, old and new."""
        return Row(torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2), is_real)

    def cut(self, length: int) -> Row:
        return Row(self.keys[:, :, :length], self.values[:, :, :length], self.is_real[:length])


def empty_row() -> Row:
    shape = SHAPE.layers, SHAPE.kv_heads, 0
    return Row(
        torch.empty((*shape, SHAPE.key_dim)), torch.empty((*shape, SHAPE.value_dim)), torch.ones(0, dtype=torch.bool)
    )
