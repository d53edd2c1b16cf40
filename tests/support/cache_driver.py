"""A cache driven without a model: random queries, keys and values, passed as transformers' layers pass them.

    RandomKV       keys, values and queries of a whole conversation, [layer][B, heads, tokens, D]
    CacheDriver    one SpinCache; `step` makes the mask as transformers does, then calls `update` and attention for each layer

`poisoned_memory` fills new memory with NaN: a read of memory that was never written shows. Storage then grows by the smallest
chunks, so that a few sequences already lie in several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask

from spin_hf import BudgetError, SpinCache
from spin_hf.attention.interface import spin_attention
from spin_hf.attention.methods.base import Method
from tests.support.tuning import tuned


@dataclass(frozen=True)
class Shape:
    """Sizes of a tiny model."""

    layers: int = 1
    kv_heads: int = 2
    group: int = 2
    key_dim: int = 8
    value_dim: int = 8

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.heads * self.key_dim, intermediate_size=8, vocab_size=32, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, head_dim=self.key_dim,
        )  # fmt: skip


@dataclass(frozen=True)
class RandomKV:
    """All inputs of a conversation, by layer: keys and values [B, kv_heads, L, D], queries [B, heads, L, Dk]."""

    shape: Shape
    keys: list[Tensor]
    values: list[Tensor]
    queries: list[Tensor]

    @classmethod
    def random(cls, shape: Shape, batch_size: int, length: int, seed: int, peak: float = 1.5) -> RandomKV:
        """Normal data; `peak` scales the queries, so that attention is far from uniform."""
        generator = torch.Generator().manual_seed(seed)

        def draw(heads: int, dim: int) -> list[Tensor]:
            return [torch.randn((batch_size, heads, length, dim), generator=generator) for _ in range(shape.layers)]

        keys, values = draw(shape.kv_heads, shape.key_dim), draw(shape.kv_heads, shape.value_dim)
        return cls(shape, keys, values, [peak * q for q in draw(shape.heads, shape.key_dim)])

    def tokens(self, chosen: slice | list[int]) -> RandomKV:
        """Some tokens only."""
        keys, values, queries = ([x[:, :, chosen] for x in xs] for xs in (self.keys, self.values, self.queries))
        return replace(self, keys=keys, values=values, queries=queries)

    def exact_in_int8(self) -> RandomKV:
        """Keys and values that int8 holds exactly: multiples of a power of two, the largest of a vector 127."""

        def rounded(states: Tensor) -> Tensor:
            step = 2.0 ** (states.abs().amax(-1, keepdim=True) / 127).log2().floor()
            return (states / step).round().clamp(-127, 127) * step

        return replace(self, keys=[rounded(x) for x in self.keys], values=[rounded(x) for x in self.values])

    def to(self, *place: Any) -> RandomKV:
        """On a device, in a dtype, or both, as `Tensor.to`."""
        keys, values, queries = ([x.to(*place) for x in xs] for xs in (self.keys, self.values, self.queries))
        return replace(self, keys=keys, values=values, queries=queries)

    def rows(self, rows: list[int]) -> RandomKV:
        """Some sequences, in that order."""
        keys, values, queries = ([x[rows] for x in xs] for xs in (self.keys, self.values, self.queries))
        return replace(self, keys=keys, values=values, queries=queries)


class CacheDriver:
    """A SpinCache of a tiny model that is not there.

    Args:
        scale, softcap, sink_logits: what the model would pass to its attention function.
        method, options: as for `SpinCache`. The default method has pages of 8 tokens.
    """

    def __init__(
        self, shape: Shape, *, scale: float | None = None, softcap: float | None = None,
        sink_logits: Tensor | None = None, method: str | Method = "shadowkv", **options: Any,
    ) -> None:  # fmt: skip
        self.shape, self.config = shape, shape.config()
        self.cache = SpinCache(self.config, method, **options)
        self.scale = shape.key_dim**-0.5 if scale is None else scale
        self.arguments = {"softcap": softcap, "s_aux": sink_logits}
        self.module = torch.nn.Module()

    @torch.no_grad()
    def step(self, kv: RandomKV, start: int, stop: int, valid: Tensor | None = None) -> list[Tensor]:
        """One forward over tokens [start, stop) of `kv`; returns [B, tokens, heads, Dv] of every layer.

        Args:
            valid: [B, stop] or a 4-D mask, as the user's `attention_mask`; None for none.
        """
        keys = kv.keys[0]
        embeds = torch.empty((keys.shape[0], stop - start, 1), dtype=keys.dtype, device=keys.device)
        mask = create_causal_mask(self.config, embeds, valid, self.cache)
        outputs = []
        for layer in range(self.shape.layers):
            new = slice(start, stop)
            key, value = self.cache.update(kv.keys[layer][:, :, new], kv.values[layer][:, :, new], layer)
            query = kv.queries[layer][:, :, new]
            out, _ = spin_attention(self.module, query, key, value, mask, scaling=self.scale, **self.arguments)
            outputs.append(out)
        return outputs

    def steps(self, kv: RandomKV, start: int, stops: Iterable[int]) -> list[Tensor]:
        """Forwards that end at each of `stops`, the first from `start`; returns the first layer's outputs."""
        outputs = []
        for stop in stops:
            outputs.append(self.step(kv, start, stop)[0])
            start = stop
        return outputs


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill all memory that torch returns uninitialised with NaN (integers: with their largest value)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with tuned(max_chunk_segments=2):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def smallest_gpu_memory(run: Callable[[int], object]) -> int:
    """The smallest cap with which `run(cap)` succeeds. A refusal says how many bytes are needed; these are tried next."""
    cap = 1
    while True:
        try:
            run(cap)
            return cap
        except BudgetError as error:
            needed = error.needed_bytes
            assert needed is not None
            assert needed > cap, f"refused with {cap}, which is {needed} or more: {error}"
            cap = needed
