"""What the launches of a decode step share: how to launch, tensors, and the numbers that grids and tiles are computed from.

    Launch         launches a kernel, or compiles it ahead
    Splits         programs that share the work of one stream, which is a (sequence, KV head) pair
    LaunchShape    sizes of a layer's pages, and limits of the device: what most kernels are compiled for
    StepBuffers    tensors of a batch, which all layers use in turn
    LayerBuffers   tensors of one layer

B sequences, H KV heads, G query heads per KV head, R = B * H streams. Captured graphs hold the addresses of all tensors.
Launches of one query take its `plan` too, int32 [B, len(PlanField)].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

_PROGRAMS = 528
"""Programs that a launch should have: four for each multiprocessor of an H100."""
_MAX_SPLITS = 64
"""Splits of a stream at most: each leaves a partial result that another kernel reads."""
_SCORE_BYTES = 16 << 10
"""Bytes of vectors that a program reads at a time."""
ATTEND_TOKENS = 128
"""Tokens of a tile of attention."""


class Launch(Protocol):
    """Launches a kernel, or does something else with what it would be launched with."""

    def __call__(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        """Take a kernel, its grid, its arguments, and its constants beside `num_warps` and `num_stages`."""


def power_of_two(number: int) -> int:
    """The lowest power of two that is no less."""
    return 1 << max(0, number - 1).bit_length()


def product_columns(group: int, digits: bool) -> int:
    """Columns of a product with the queries of `group` heads: eight at least, and `digits` take two each."""
    return max(4 if digits else 8, power_of_two(group))


def rerank_sizes(group: int, key_dim: int, dtype: torch.dtype, multiplies_int8: bool) -> tuple[bool, int, int]:
    """How keys in four bits are multiplied: whether by queries of two digits; columns of a product; padded bytes of a key."""
    digits = multiplies_int8 and dtype != torch.float32
    return digits, product_columns(group, digits), max(32 if digits else 16, power_of_two(-(-key_dim // 2)))


@dataclass(frozen=True)
class Splits:
    """Programs of each stream.

    Attributes:
        programs: that a launch should have.
        score, attend, dense, estimate: splits of scoring, of attention in sparse and in dense layers, and of estimation.
    """

    programs: int
    score: int
    attend: int
    dense: int
    estimate: int

    @classmethod
    def choose(cls, num_streams: int, *, most_tokens: int | None, estimates: bool) -> Splits:
        """Args: most_tokens: that a query attends to at most; None if unknown. estimates: whether some pages are estimated."""
        programs = max(1, _PROGRAMS // num_streams)
        attend = dense = min(_MAX_SPLITS, programs)
        if most_tokens is not None:  # one for each tile, if there is room
            attend = min(attend, -(-most_tokens // ATTEND_TOKENS))
        estimate = min(_MAX_SPLITS, programs) if estimates else 0
        return cls(programs, min(_MAX_SPLITS, power_of_two(programs)), attend, dense, estimate)


@dataclass(frozen=True)
class LaunchShape:
    """Sizes of a layer's pages, and limits of its device.

    Attributes:
        dtype: of keys and values in the GPU tier, and of summaries that are not quantized.
        quantized: for each of the method's summaries, whether it is int8 with a scale.
        page_bytes: of a page in the GPU tier.
        backing_bytes: of a page where it is backed, if that is int8; 0 if it is as in the GPU tier.
        segment_pages, rows_per_chunk: of the page table and of the page store.
        padded: whether some tokens are padding.
        multiplies_int8: whether Triton multiplies int8 on tensor cores.
        shared_memory: bytes that a program may use.
        compiled: whether kernels are compiled for a device; else they are interpreted.
    """

    dtype: torch.dtype
    quantized: tuple[bool, ...]
    num_heads: int
    key_dim: int
    value_dim: int
    page_size: int
    page_bytes: int
    backing_bytes: int
    segment_pages: int
    rows_per_chunk: int
    padded: bool
    multiplies_int8: bool
    shared_memory: int
    compiled: bool

    @property
    def block_k(self) -> int:
        """Columns of a tile of keys."""
        return max(32, power_of_two(self.key_dim))

    @property
    def block_v(self) -> int:
        """Columns of a tile of values."""
        return max(16, power_of_two(self.value_dim))

    @property
    def scores_digits(self) -> bool:
        """Whether the first summaries are multiplied as int8, by queries of two digits."""
        return self.quantized[0] and self.multiplies_int8

    def segments_at_a_time(self, width: int, item_bytes: int) -> int:
        """Segments whose vectors, of `width` numbers of `item_bytes`, a program reads at a time."""
        segment = self.segment_pages * width
        room = self.shared_memory // (4 * segment * max(2, item_bytes))  # vectors may be converted
        return power_of_two(max(1, min(_SCORE_BYTES // (segment * item_bytes), room)) + 1) // 2


@dataclass(frozen=True)
class StepBuffers:
    """Tensors of a batch, float32 unless another dtype is named.

    Attributes:
        splits: see `Splits`.
        step: int64 [len(StepField)], the step descriptor.
        histogram, rerank_histogram: int32 [R, NUM_BINS]: pages by bin of their scores, and by that of new ones.
        zone_edges: int32 [R]: the last bin that is estimated.
        list_count: int32 [R, 2]: pages that a query attends to, and how many of them are to be loaded.
        arrivals: int32 [R], zeros between launches.
        stats: [R, splits.score * 2 * columns]: maximum and sum of each split's logits.
        split_outputs: [R, (splits + estimates) * 2 * G * Dv]: output and log-sum-exp of each split.
        basis: [Dk, Dk], the rotation of keys in four bits; rotated: [R, G * Dk]; operands, factors, rerank_stats: see
            `decode/rerank_queries.py`. All of these are empty unless pages are reranked.
    """

    splits: Splits
    step: Tensor
    histogram: Tensor
    rerank_histogram: Tensor
    zone_edges: Tensor
    list_count: Tensor
    arrivals: Tensor
    stats: Tensor
    split_outputs: Tensor
    basis: Tensor
    rotated: Tensor
    operands: Tensor
    factors: Tensor
    rerank_stats: Tensor

    @property
    def num_streams(self) -> int:
        return self.list_count.shape[0]

    @property
    def scratch(self) -> tuple[Tensor, ...]:
        """Those that a step writes before it reads them."""
        return self.stats, self.split_outputs, self.rotated, self.operands, self.factors, self.rerank_stats


@dataclass(frozen=True)
class LayerBuffers:
    """Tensors of one layer.

    Attributes:
        number: of the layer among the paged ones.
        descriptor: int64 [len(LayerField)].
        floors, rerank_floors: int32 [R]: the last bin whose pages are kept to select from, and to rerank.
        hands: int32 [R]: the slot from which victims are looked for.
        counters: int64 [len(Counter)].
    """

    number: int
    descriptor: Tensor
    floors: Tensor
    rerank_floors: Tensor
    hands: Tensor
    counters: Tensor
