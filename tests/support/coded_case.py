"""Coded pages of a few sequences in chunked arrays, and the descriptors through which kernels reach them, without a cache.

Segments lie in a random order, chunks are filled with poison before: NaN in scales, 255 in codes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spin_hf.kernels.descriptor_fields import NUM_BINS, LayerField, PlanField, Rating, StepField
from spin_hf.kernels.launch import (
    Launch,
    LaunchShape,
    LayerBuffers,
    ScanBuffers,
    Splits,
    StepBuffers,
    product_columns,
)  # fmt: skip
from spin_hf.kernels.recipe import KernelRecipe
from spin_hf.kernels.reference_scan import UNIT_PAGES, CodedBasis, CodedPages, unpack

PAGE, SEGMENT, CHUNK = 4, 32, 64
"""Tokens per page, pages per segment, pages per chunk."""


@dataclass
class CodedCase:
    """Random codes, and buffers of one layer.

    Args:
        lengths: tokens of each sequence that have codes; the others up to the longest are padding in front of it.
        budget: pages to select.
    """

    group: int = 4
    key_dim: int = 64
    value_dim: int = 64
    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] = (1100,)
    num_heads: int = 2
    sinks: int = 1
    recent: int = 3
    budget: int = 24
    digits: bool = True
    spread: float = 0.3
    seed: int = 0
    held: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.batch, self.tokens = len(self.lengths), max(self.lengths)
        self.num_pages = -(-self.tokens // PAGE)
        self.padded = min(self.lengths) < self.tokens
        tokens = torch.arange(self.num_pages * PAGE)
        self.valid = torch.stack([(tokens >= self.tokens - n) & (tokens < self.tokens) for n in self.lengths])
        self.shape = LaunchShape(
            dtype=self.dtype, quantized=(True, False, False, False, False), num_heads=self.num_heads, key_dim=self.key_dim,
            value_dim=self.value_dim, page_size=PAGE,
            page_bytes=PAGE * (self.key_dim + self.value_dim) * self.dtype.itemsize, backing_bytes=0,
            segment_pages=SEGMENT, rows_per_chunk=CHUNK, padded=self.padded, multiplies_int8=self.digits,
            shared_memory=48 << 10, compiled=False,
        )  # fmt: skip
        self.basis, self.pages = self._basis(), self._pages()
        self.keys, self.values = self._tokens()
        self.query = self._draw(self.batch, self.num_heads * self.group, 1, self.key_dim).to(self.dtype)
        self.scale = self.spread / math.sqrt(self.key_dim)
        self._describe()

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def _basis(self) -> CodedBasis:
        heads, quarter = (self.batch, self.num_heads), torch.tensor([2.0, 0.8, 0.4, 0.1])
        steps = torch.tensor([0.335, 0.996, 0.996, 0.0])

        def widths(dim: int) -> Tensor:
            return (quarter * steps).repeat_interleave(dim // 4).expand(*heads, dim) * (1 + self._draw(*heads, 1).abs())

        inverse = self._draw(*heads, self.key_dim, self.key_dim).to(self.dtype) / math.sqrt(self.key_dim)
        axes = torch.linalg.qr(self._draw(*heads, self.value_dim, self.value_dim)).Q.to(self.dtype)
        return CodedBasis(
            inverse.to(self.dtype), self._draw(*heads, self.key_dim), widths(self.key_dim), axes.contiguous(),
            self._draw(*heads, self.value_dim), widths(self.value_dim),
            torch.linalg.inv(inverse.double()).mT.to(self.dtype),
        )  # fmt: skip

    def _pages(self) -> CodedPages:
        heads, pages = (self.batch, self.num_heads), self.num_pages
        units = -(-pages // UNIT_PAGES)

        def codes(*shape: int) -> Tensor:
            return torch.randint(0, 256, shape, generator=self.generator, dtype=torch.uint8)

        mean = torch.randint(-127, 128, (*heads, units, self.key_dim), generator=self.generator, dtype=torch.int8)
        unit = torch.rand((*heads, units), generator=self.generator) * 0.04
        scale = (self._draw(*heads, pages, PAGE).abs() + 0.2).bfloat16()
        scale = scale.where(self.valid.view(self.batch, 1, pages, PAGE), torch.tensor(-1.0).bfloat16())
        value_scale = (self._draw(*heads, pages).abs() + 0.2).bfloat16()
        return CodedPages(
            mean, unit, codes(*heads, pages, PAGE, self.key_dim // 4), scale, codes(*heads, pages, self.value_dim // 4),
            value_scale,
        )  # fmt: skip

    def _tokens(self) -> tuple[Tensor, Tensor]:
        """Keys and values that the codes are about right for."""
        basis, pages = self.basis, self.pages
        means = (pages.mean * pages.unit.unsqueeze(-1)).repeat_interleave(UNIT_PAGES, 2)[:, :, : self.num_pages]
        inside = (
            unpack(pages.codes, torch.float32)
            * basis.widths[:, :, None, None]
            * pages.scale.float().abs().unsqueeze(-1)
        )
        keys = (inside + means.unsqueeze(3)).flatten(2, 3) @ basis.inverse.float().mT + basis.origin.unsqueeze(2)
        coordinates = unpack(pages.value_codes, torch.float32) * basis.value_widths.unsqueeze(2)
        values = coordinates * pages.value_scale.float().unsqueeze(-1) @ basis.value_axes.float().mT
        values = (values + basis.value_origin.unsqueeze(2)).repeat_interleave(PAGE, 2)
        noise = self._draw(*keys.shape), self._draw(*values.shape)
        return (keys + 0.05 * noise[0]).to(self.dtype), (values + 0.1 * noise[1]).to(self.dtype)

    # ------------------------------------------------------------------------------------------------ what kernels read

    def _table(self, rows: Tensor, per_chunk: int, poison: float, places: Tensor) -> int:
        """Chunks of rows [B, H, n, ...] at `places` [B, H, n], all else poison; the address of their table."""
        flat = rows.flatten(0, 2)
        number = (int(places.max()) // per_chunk + 1) * per_chunk
        chunks = torch.full((number, *flat.shape[1:]), poison, dtype=torch.float64).to(flat.dtype)
        chunks[places.flatten()] = flat
        split = [chunk.clone() for chunk in chunks.split(per_chunk)]
        table = torch.tensor([chunk.data_ptr() for chunk in split])
        self.held += [*split, table]
        return table.data_ptr()

    def _describe(self) -> None:
        streams, segments = self.batch * self.num_heads, -(-self.num_pages // SEGMENT)
        order = torch.randperm(self.batch * segments + 3, generator=self.generator)[: self.batch * segments]
        self.directory = order.view(self.batch, segments).int()
        pages = torch.arange(self.num_pages)
        per_head = (
            self.directory.long()[:, None, pages // SEGMENT] * self.num_heads + torch.arange(self.num_heads)[:, None]
        )
        rows = per_head * SEGMENT + pages % SEGMENT
        units = rows[..., ::UNIT_PAGES] // UNIT_PAGES
        self.step, self.layer = (torch.zeros(len(fields), dtype=torch.int64) for fields in (StepField, LayerField))
        nan, coded = float("nan"), self.pages
        length = self.tokens - 1  # the last token is the step's own
        stored = [x.clone() for x in (self.keys, self.values)]
        for states in stored:
            states[:, :, length] = nan  # the step appends it
        per_page = torch.cat([x.view(*x.shape[:2], self.num_pages, -1) for x in stored], -1)
        empty = ~self.valid.view(self.batch, 1, self.num_pages, PAGE).any(-1)  # padding has no codes
        no_unit = torch.nn.functional.pad(empty, (0, -self.num_pages % UNIT_PAGES), value=True)
        no_unit = no_unit.unflatten(-1, (-1, UNIT_PAGES)).all(-1)
        scale, value_scale = (
            coded.scale.masked_fill(empty.unsqueeze(-1), nan),
            coded.value_scale.masked_fill(empty, nan),
        )
        unit = coded.unit.masked_fill(no_unit, nan)
        for number, summary in enumerate(
            (None, coded.codes.flatten(3), scale, coded.value_codes, value_scale.unsqueeze(-1))
        ):
            if summary is not None:
                poison = nan if summary.is_floating_point() else 255
                self.layer[LayerField.SUMMARY_0 + 2 * number] = self._table(summary, CHUNK, poison, rows)
        self.layer[LayerField.SUMMARY_0] = self._table(coded.mean, CHUNK // UNIT_PAGES, 127, units)
        self.layer[LayerField.SCALE_0] = self._table(unit.unsqueeze(-1), CHUNK // UNIT_PAGES, nan, units)
        self.layer[LayerField.BACKING] = self._table(per_page, CHUNK, nan, rows)
        vectors = torch.cat(
            [self.basis.origin, self.basis.widths, self.basis.value_origin, self.basis.value_widths], -1
        ).contiguous()
        self.held += [vectors, self.basis.inverse, self.basis.value_axes]
        self.layer[LayerField.KEY_BASIS] = self.basis.inverse.data_ptr()
        self.layer[LayerField.VALUE_BASIS] = self.basis.value_axes.data_ptr()
        self.layer[LayerField.BASIS_VECTORS] = vectors.data_ptr()
        capacity = max(1024, 2 * self.num_pages)

        def scratch(step_field: StepField, shape: tuple[int, ...], dtype: torch.dtype, fill: float) -> Tensor:
            made = torch.full(shape, fill, dtype=torch.float64).to(dtype)
            self.held.append(made)
            self.step[step_field] = made.data_ptr()
            return made

        heads = (self.batch, self.num_heads)
        self.logits = scratch(StepField.LOGITS, (*heads, self.group, capacity), torch.float32, nan)
        self.scores = scratch(StepField.SCORES, (*heads, capacity), torch.float32, nan)
        scratch(StepField.BIN_LIST_PAGE, (*heads, capacity), torch.int32, 0)
        scratch(StepField.BIN_LIST_SCORE, (*heads, capacity), torch.float32, 0)
        scratch(StepField.BIN_LIST_LENGTH, (*heads, capacity), torch.int32, 0)
        scratch(StepField.TIED, (*heads, capacity), torch.int64, 0)
        self.listed = scratch(StepField.LIST_PAGE, (*heads, capacity), torch.int32, 0)
        scratch(StepField.OUTLIER, (1, *heads, capacity), torch.uint8, 0)
        valid = scratch(StepField.VALID, self.valid.shape, torch.uint8, 0)
        valid.copy_(self.valid)
        upto = scratch(StepField.UPTO, (self.batch, self.valid.shape[1] + 1), torch.int32, 0)
        upto[:, 1:] = self.valid.cumsum(1)
        self.step[StepField.BASE_TOKENS] = self.valid.shape[1]
        self.step[StepField.POSITION], self.step[StepField.PAGE_CAPACITY] = length, capacity
        self.step[StepField.LIST_CAPACITY] = capacity
        self.step[StepField.DIRECTORY], self.step[StepField.DIRECTORY_STRIDE] = self.directory.data_ptr(), segments
        self.plan = torch.zeros((self.batch, len(PlanField)), dtype=torch.int32)
        leading = torch.tensor([(self.tokens - n) // PAGE for n in self.lengths], dtype=torch.int32)
        self.plan[:, PlanField.LEADING], self.plan[:, PlanField.FIRST] = leading, leading + self.sinks
        self.plan[:, PlanField.STOP], self.plan[:, PlanField.NUM_PAGES] = self.num_pages - self.recent, self.num_pages
        self.plan[:, PlanField.NUM_SELECTED] = self.budget
        first, stop = self.plan[:, PlanField.FIRST, None, None], self.plan[:, PlanField.STOP, None, None]
        self.candidates = ((pages >= first) & (pages < stop)).expand(*heads, self.num_pages)
        self.plan[:, PlanField.CANDIDATES] = self.candidates[:, 0].sum(-1).int()
        splits = Splits(programs=3, score=2, attend=3, dense=3, estimate=0)
        empty = torch.empty(0)
        self.buffers = StepBuffers(
            splits=splits, step=self.step, histogram=torch.ones((streams, NUM_BINS), dtype=torch.int32),
            rerank_histogram=empty, zone_edges=torch.zeros(streams, dtype=torch.int32),
            list_count=torch.zeros((streams, 2), dtype=torch.int32), arrivals=torch.zeros(streams, dtype=torch.int32),
            stats=torch.full((streams, splits.score, 2, product_columns(self.group, self.digits)), nan),
            split_outputs=torch.full((streams, splits.attend, 2, self.group, self.value_dim), nan), basis=empty,
            rotated=empty, operands=empty, factors=empty, rerank_stats=empty,
        )  # fmt: skip
        floors = torch.full((streams,), NUM_BINS, dtype=torch.int32)
        counters = torch.zeros(8, dtype=torch.int64)
        hands = torch.zeros(streams, dtype=torch.int32)
        self.layer_buffers = LayerBuffers(0, self.layer, floors, floors, hands, counters)
        self.scan = ScanBuffers.allocate(
            streams, self.group, splits, self.key_dim, self.value_dim, self.digits, torch.device("cpu")
        )
        for tensor in vars(self.scan).values():
            tensor.fill_(nan if tensor.is_floating_point() else 127)

    def exact(self, name: str) -> Any:
        """`basis` or `pages` in float64."""
        made = getattr(self, name)
        return type(made)(**{key: x.double() if x.is_floating_point() else x for key, x in vars(made).items()})

    def queries(self) -> Tensor:
        """[B, H, G, D], float64."""
        return self.query.squeeze(2).unflatten(1, (self.num_heads, self.group)).double()

    def launches(self, launch: Launch, softcap: float | None = None) -> Tensor:
        """All launches of a step, which also append its token. Returns the output [B, H * G, Dv]."""
        from spin_hf.kernels.triton_launchers import launchers

        recipe, plan, last = KernelRecipe(Rating.MEAN), self.plan, self.tokens - 1
        common, shape = (launch, self.buffers), self.shape
        new = self.keys[:, :, last : last + 1].clone(), self.values[:, :, last : last + 1].clone()
        out = torch.full((self.batch, self.num_heads * self.group, self.value_dim), float("nan"), dtype=self.dtype)
        own, query, scale = self.layer_buffers, self.query, self.scale
        launchers.project_queries(*common, self.scan, own, query, scale=scale, shape=shape)
        launchers.scan_pages(*common, self.scan, own, plan, new, group=self.group, softcap=softcap, shape=shape)
        launchers.rank_pages(
            *common, own, plan, query_index=0, group=self.group, most_listed=None, recipe=recipe, shape=shape,
            scan=self.scan,
        )  # fmt: skip
        launchers.attend_pages(
            *common, own, query, out, None, query_index=0, num_queries=1, dense=False, scale=scale, softcap=softcap,
            shape=shape, scan=self.scan, plan=plan,
        )  # fmt: skip
        return out

    def listed_pages(self) -> Tensor:
        """[B, H, N], whether a page is in the page list."""
        counts = self.buffers.list_count[:, 0].view(self.batch, self.num_heads)
        read = torch.zeros(self.candidates.shape, dtype=torch.bool)
        for b in range(self.batch):
            for h in range(self.num_heads):
                read[b, h, self.listed[b, h, : int(counts[b, h])].long()] = True
        return read
