"""Two-bit keys, a rival for comparisons of quality: `--methods two-bit-keys:model`.

The idea of "KV Cache Offloading for Context-Intensive Tasks" (arXiv 2604.08426) is kept: no landmarks of chunks, but every
token's own key in two bits, which stays on the GPU; the tokens with the best products are read exactly.

    code(key)      rotate by a Hadamard matrix  ->  scale to unit variance  ->  nearest of four levels, the best for a normal
                   distribution (Lloyd-Max)
    score(token)   max over the query heads of a KV head of  log softmax over candidates (scale * q . decoded key)

Pages are single tokens, so selection takes exactly the best tokens. Keys are stored decoded: this measures the formula's
quality, not its speed. What the paper adds for memory (residuals of keys, values in few bits) is left out, in favour of the
rival: selected tokens are read unquantized.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from spin_hf.attention.methods.base import PageMethod, Query, Summaries

LEVELS = (0.4528, 1.510)
"""The best four levels for a normal distribution of variance 1 are these and their negatives (Max, 1960)."""
_BORDER = sum(LEVELS) / 2


@lru_cache(maxsize=4)
def hadamard(size: int) -> Tensor:
    """The Hadamard matrix of a power of two, orthonormal: [size, size], float32. It is its own inverse."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    if len(matrix) != size:
        raise ValueError(f"expected heads of a power of two, got {size}")
    return matrix / size**0.5


def in_two_bits(keys: Tensor) -> Tensor:
    """What remains of keys [..., D] in two bits per number and one scale per key; float32."""
    rotation = hadamard(keys.shape[-1])
    rotated = keys.float() @ rotation
    scale = rotated.square().mean(-1, keepdim=True).sqrt()
    inner, outer = LEVELS
    magnitude = torch.where(rotated.abs() > _BORDER * scale, outer, inner)
    return (magnitude * rotated.sign() * scale) @ rotation


@dataclass(frozen=True)
class TwoBitKeys(PageMethod):
    """Selects single tokens by their keys in two bits."""

    name: ClassVar[str] = "two-bit-keys"
    page_size: ClassVar[int] = 1

    def summary_shapes(self, head_dim: int, value_dim: int) -> dict[str, tuple[int, ...]]:
        """`key` [D], decoded."""
        return {"key": (head_dim,)}

    def index(self, keys: Tensor, valid: Tensor) -> Summaries:
        """The decoded key of each token."""
        return {"key": in_two_bits(keys).squeeze(-2)}

    def score(self, query: Query, summary: Callable[..., Tensor]) -> Tensor:
        """Maximum over the group of the log softmax over candidates, as of `ShadowKV`."""
        logits = query.states @ summary("key").transpose(-1, -2) * query.scale
        logits = logits.masked_fill(~query.candidates[:, None, None], float("-inf"))
        return torch.log_softmax(logits, dim=-1).amax(2)
