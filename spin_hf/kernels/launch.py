"""Arguments common to the launches of a decode step: the launcher, tensors, and sizes that determine grids and tiles.

    Launch         launches a kernel, or compiles it ahead
    Splits         programs per stream; a stream is a (sequence, KV head) pair
    LaunchShape    sizes of a layer's pages and limits of the device; most kernels are specialized on them
    StepBuffers    tensors of a batch, reused by every layer
    LayerBuffers   tensors of one layer
    ScanBuffers    tensors of the scan over coded pages, reused by every layer
    RowCopy        rows of chunked arrays and what is copied from or to them, for `copy_rows`

B sequences, H KV heads, G query heads per KV head, R = B * H streams. Captured graphs hold the addresses of all tensors.
Launches of one query also take its `plan`, int32 [B, len(PlanField)].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

_MAX_SPLITS = 64
"""Upper limit of splits per stream. Every split writes a partial result that is read again by the merge."""
_MAX_SCAN_SPLITS = 128
_SCANS_PER_PROGRAM = 2
"""Programs of the scan over coded pages in place of one of another launch: they have one warp and all registers of it."""
_SCORE_BYTES = 16 << 10
"""Bytes of vectors per tile of a program."""
ATTEND_TOKENS = 128
"""Tokens per attention tile."""


class Launch(Protocol):
    """Launches a kernel, or compiles it for the same arguments."""

    def __call__(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        """Args: options: the kernel's constexpr arguments, `num_warps` and `num_stages`."""


class RowCopy(NamedTuple):
    """A copy of the same rows of several arrays with one shape of rows and size of chunks.

    Attributes:
        tables: for each array, int64 [chunks]: the address of each chunk.
        rows: int64 of any shape, contiguous.
        packed: [arrays, *rows.shape, *row_shape], contiguous.
    """

    tables: list[Tensor]
    rows_per_chunk: int
    rows: Tensor
    packed: Tensor


def power_of_two(number: int) -> int:
    """Round up to a power of two."""
    return 1 << max(0, number - 1).bit_length()


def padded_key(key_dim: int) -> int:
    """Numbers of a key, padded to a width that products take."""
    return max(32, power_of_two(key_dim))


def product_columns(group: int, digits: bool) -> int:
    """Query heads per product tile: `group` rounded up so that the tile has at least eight columns. `digits` takes two each."""
    return max(4 if digits else 8, power_of_two(group))


def rerank_sizes(group: int, key_dim: int, dtype: torch.dtype, multiplies_int8: bool) -> tuple[bool, int, int]:
    """Sizes of products with 4-bit keys: whether queries are two int8 digits, query heads per tile, padded bytes of a key."""
    digits = multiplies_int8 and dtype != torch.float32
    return digits, product_columns(group, digits), max(32 if digits else 16, power_of_two(-(-key_dim // 2)))


@dataclass(frozen=True)
class Splits:
    """Programs per stream.

    Attributes:
        programs: target number for a launch without a limit of its own.
        score, attend, dense, estimate: splits of scoring, of attention in sparse and in dense layers, and of estimation.
        whole: splits of attention to whole segments. Each one is read again by the merge, so there are at most 32.
    """

    programs: int
    score: int
    attend: int
    dense: int
    estimate: int
    whole: int = 1

    @classmethod
    def choose(
        cls, num_streams: int, *, programs: int, most_tokens: int | None, estimates: bool, scans_codes: bool = False
    ) -> Splits:  # fmt: skip
        """Choose the splits of all launches.

        Args:
            programs: target number for all streams together.
            most_tokens: upper limit of tokens per query; None if unknown.
            estimates: whether any page is estimated.
            scans_codes: whether pages are scored by the scan over coded pages, whose programs have one warp.
        """
        scan = max(1, _SCANS_PER_PROGRAM * programs // num_streams)
        programs = max(1, programs // num_streams)
        attend = dense = min(_MAX_SPLITS, programs)
        if most_tokens is not None:  # one tile per split, up to the limit
            attend = min(attend, -(-most_tokens // ATTEND_TOKENS))
        estimate = min(_MAX_SPLITS, programs) if estimates else 0
        score = min(_MAX_SPLITS, power_of_two(programs))
        if scans_codes:  # all of them run at once
            score = min(_MAX_SCAN_SPLITS, power_of_two(scan + 1) // 2)
        return cls(programs, score, attend, dense, estimate, min(32, programs))


@dataclass(frozen=True)
class LaunchShape:
    """Sizes of a layer's pages and limits of its device.

    Attributes:
        dtype: of keys and values in the GPU tier, and of summaries that are not quantized.
        quantized: for each of the method's summaries, whether it is int8 with a scale.
        page_bytes: size of a page in the GPU tier.
        backing_bytes: size of a page in the backing store if that is int8; 0 if it has the layout of the GPU tier.
        segment_pages, rows_per_chunk: of the page table and of the page store.
        padded: whether some tokens are padding.
        multiplies_int8: whether Triton multiplies int8 on tensor cores.
        shared_memory: bytes that a program may use.
        compiled: whether kernels are compiled for a device; else they are interpreted.
        overlaps: whether a kernel is launched while the previous one still runs (`device_limits.overlaps_launches`).
        apart: whether each sequence has descriptors of its own (`backends/row_kernels.py`).
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
    overlaps: bool = False
    apart: bool = False

    @property
    def block_k(self) -> int:
        """Padded width of a key."""
        return padded_key(self.key_dim)

    @property
    def block_v(self) -> int:
        """Padded width of a value."""
        return max(16, power_of_two(self.value_dim))

    @property
    def coded_dtype(self) -> torch.dtype:
        """In which weights and coded values are multiplied: float16 has more digits than bfloat16, and codes are small."""
        return torch.float32 if self.dtype == torch.float32 or not self.multiplies_int8 else torch.float16

    @property
    def scores_digits(self) -> bool:
        """Whether the first summary is multiplied as int8, by queries of two digits."""
        return self.quantized[0] and self.multiplies_int8

    def segments_at_a_time(self, width: int, item_bytes: int) -> int:
        """Segments per tile of a program, for vectors of `width` numbers of `item_bytes` each."""
        segment = self.segment_pages * width
        room = self.shared_memory // (4 * segment * max(2, item_bytes))  # int8 vectors may be converted to 16 bits
        return power_of_two(max(1, min(_SCORE_BYTES // (segment * item_bytes), room)) + 1) // 2


def dependent(shape: LaunchShape) -> dict[str, bool]:
    """Options of a launch whose kernel calls `common.wait_for_launch`: PDL, and what Triton takes for it."""
    return {"PDL": True, "launch_pdl": True} if shape.overlaps else {"PDL": False}


@dataclass(frozen=True)
class StepBuffers:
    """Tensors of a batch, float32 unless another dtype is named.

    Attributes:
        splits: see `Splits`.
        step: int64 [len(StepField)], the step descriptor; [B, len(StepField)] if sequences have descriptors of their own.
        histogram, rerank_histogram: int32 [R, NUM_BINS]: pages per score bin, before and after reranking.
        zone_edges: int32 [R]: the last bin that is estimated.
        list_count: int32 [R, 2]: pages that the query attends to, and how many of them must be loaded.
        arrivals: int32 [R]: splits that have finished; zeros between launches.
        stats: [R, splits.score * 2 * columns]: maximum and sum of exponentials of each split's logits.
        split_outputs: [R, (attention splits + estimation splits) * 2 * G * Dv]: output and log-sum-exp of each split.
        basis: [Dk, Dk], the rotation of 4-bit keys; rotated: [R, G * Dk]; operands, factors, rerank_stats: see
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
        """Buffers that every step writes before it reads them."""
        return self.stats, self.split_outputs, self.rotated, self.operands, self.factors, self.rerank_stats


@dataclass(frozen=True)
class LayerBuffers:
    """Tensors of one layer.

    Attributes:
        number: index of the layer among the paged layers.
        descriptor: int64 [len(LayerField)]; [B, len(LayerField)] if sequences have descriptors of their own.
        floors, rerank_floors: int32 [R]: the last bin that enters the bin lists, for selection and for reranking.
        hands: int32 [R]: the slot at which the search for victims starts (clock hand).
        counters: int64 [len(Counter)]; [B, len(Counter)] if sequences have descriptors of their own.
    """

    number: int
    descriptor: Tensor
    floors: Tensor
    rerank_floors: Tensor
    hands: Tensor
    counters: Tensor


@dataclass(frozen=True)
class ScanBuffers:
    """Tensors of the scan over coded pages, float32 unless another dtype is named. Every step writes them before it reads them.

    `columns` query heads per KV head, as many as products have columns. Sums are relative to a power of two. Those in
    `partials` are of fields of the value codes, less 1.5 (`reference_scan.coded_sum`); the others are of values.

    Attributes:
        states: [R, G, D]: queries in the coordinates of the codes.
        mean_operand: int8 [R, 2 * columns, padded D]: `states` as two digits; or float32 [R, columns, padded D].
        code_operand: [R, 4, 2 * columns, padded D / 4] in that dtype: what the fields of a byte are multiplied by. The last
            dimension of both has the order of `coded_fields.multiplied_at`.
        factors: [R, 4, columns]: factor and constant of products with codes, factor and constant of products with means.
        partials: [R, splits.score, G, Dv + 2]: sum of fields, power, and sum of weights of each split's candidates. Without
            candidates the power is -infinity, and the sum of fields is not written.
        estimate: [R, G, Dv + 2]: sum of values, power, and sum of weights of all candidates.
        subtracted: [R, splits.attend / 2, G, Dv + 1]: sum of values and of weights of the candidates that attention reads, in
            as many parts as programs subtract, relative to the power in `estimate`.
    """

    states: Tensor
    mean_operand: Tensor
    code_operand: Tensor
    factors: Tensor
    partials: Tensor
    estimate: Tensor
    subtracted: Tensor

    @classmethod
    def allocate(
        cls, num_streams: int, group: int, splits: Splits, key_dim: int, value_dim: int, digits: bool, device: torch.device
    ) -> ScanBuffers:  # fmt: skip
        """Allocate tensors. `digits`: whether operands are int8 digits (`LaunchShape.multiplies_int8`)."""
        columns = product_columns(group, digits)
        rows, operand = columns * (2 if digits else 1), torch.int8 if digits else torch.float32

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty((num_streams, *shape), dtype=dtype, device=device)

        return cls(
            states=new(group, key_dim),
            mean_operand=new(rows, padded_key(key_dim), dtype=operand),
            code_operand=new(4, rows, code_bytes(key_dim), dtype=operand),
            factors=new(4, columns),
            partials=new(splits.score, group, value_dim + 2),
            estimate=new(group, value_dim + 2),
            subtracted=new(-(-splits.attend // 2), group, value_dim + 1),
        )


def scan_columns(group: int, shape: LaunchShape) -> tuple[int, int]:
    """Query heads per product of the scan, and rows of its operands: two per head if these are int8 digits."""
    columns = product_columns(group, shape.multiplies_int8)
    return columns, columns * (2 if shape.multiplies_int8 else 1)


def code_bytes(dim: int) -> int:
    """Padded bytes of the codes of a vector."""
    return max(32, power_of_two(dim // 4))
