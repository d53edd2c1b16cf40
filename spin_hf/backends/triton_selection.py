"""The launches that choose the pages of one query of a step, by the recipe of the method, and retrieve them.

    find_outliers    ShadowKV only; once a step for all layers
    kernel_queries   of a method that asks (`attention`)                           -> one query of its own for each KV head
    score, rate      one vector of every candidate, or a box                       -> histogram of scores
    closer, rate     with `looked_at`: the best by that, by their keys in four bits -> histogram of new scores
    choose           the best up to the budget, and their page frames

The specification is the method's `select`; `tests/kernels` holds both against each other.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..attention.methods import four_bit_keys
from ..attention.methods.base import Method
from ..kernels.descriptor_fields import BINS_PER_NAT, NUM_BINS, PART_PAGES, PlanField, Rating
from ..kernels.recipe import MOST_EXCESS, Recipe
from ..storage.page_table import SEGMENT_PAGES
from .descriptors import power_of_two

if TYPE_CHECKING:
    from ..state import LayerState
    from .triton_step import StepKernels

_SCORE_BYTES, _SCORE_WARPS, _SCORE_SPLITS = 16 << 10, 4, 64
"""Of a program of scoring: bytes of vectors at a time, warps, and programs at most for each KV head."""
_RATE_WARPS = 8
_CLOSER_TOKENS, _CLOSER_WARPS = 128, 4
"""Of a program that looks closer: tokens at a time, warps."""
_CHOOSE_TILE, _CHOOSE_WARPS, _FEW_TIED, _FEW_TILE = 1024, 8, 64, 64
"""Of a program that chooses: pages of a tile, warps; pages of a bin that are compared each with each, so many at a time."""
_LOOKED_AT_TILE, _LOOKED_AT_WARPS, _LOOKED_AT_TIED, _LOOKED_AT_FEW_TILE = 4096, 16, 512, 32
"""Likewise where all that were looked at closer are there to choose from: many more."""
_CHOOSE_PARTS, _TIED_TILE = 128, 512
"""Parts of a tile; pages of one bin at a time in a search."""
_LIST_TILE, _HAND_TILE, _SLOT_TILE = 512, 512, 2048
"""Pages of a list at a time, if it may be longer twice as many; slots at the hand, and where all are looked at."""
_KEPT = 3
"""So many times the pages that are chosen are looked at, if scores are spread as they were at the last step."""
_COUNTED = 2
"""Likewise so many times the pages that are looked at closer are counted."""


class Selection:
    """Buffers and launches of one cache's choices on one device.

    Args:
        step: the kernels it belongs to.
        programs: that a launch should have for each (sequence, KV head).
    """

    def __init__(self, step: StepKernels, programs: int) -> None:
        self.step, self.recipe = step, step.recipe
        layers, streams = len(step.shared.layers), step.streams
        self.programs = programs
        self.splits = min(_SCORE_SPLITS, power_of_two(programs))
        self.edges = step.new((layers, streams), torch.int64)
        self.histogram = step.new((streams, NUM_BINS), torch.int32)
        self.second_histogram = step.new((streams if self.recipe.looked_at else 0, NUM_BINS), torch.int32)
        self.floors = step.new((layers, streams), torch.int32, NUM_BINS)
        """Of the pages to choose from; and of those to look at."""
        self.first_floors = step.new((layers if self.recipe.looked_at else 0, streams), torch.int32, NUM_BINS)
        self.hands = step.new((layers, streams), torch.int32)
        self.zone_edges = step.new((streams,), torch.int32)
        self.list_count = step.new((streams, 2), torch.int32)
        self.stats = self.rotated = self.operands = self.factors = self.closer_stats = step.new((0,), torch.float32)
        self.basis = step.new((0,), torch.float32)
        self.placed_by: dict[int, Method] = {}
        """Whose tensors launches for a layer read: they live as long as these launches."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What captured launches hold the addresses of."""
        return (
            self.edges, self.histogram, self.second_histogram, self.floors, self.first_floors, self.hands, self.zone_edges,
            self.list_count, self.stats, self.rotated, self.operands, self.factors, self.closer_stats, self.basis,
        )  # fmt: skip

    @property
    def scratch(self) -> tuple[Tensor, ...]:
        """Of these, what a step writes before it reads it."""
        return self.stats, self.rotated, self.operands, self.factors, self.closer_stats

    def fit(self, group: int, key_dim: int, dtype: torch.dtype) -> None:
        """Buffers for so many query heads a KV head, of this size."""
        streams, looks = self.step.streams, self.programs
        self.stats = self._scratch(streams, self.splits * 2 * max(16, power_of_two(group)))
        if self.recipe.looked_at:
            shape = self._closer_shape(group, key_dim, dtype)
            rows = shape["CLOSER_G"] * (2 if shape["DIGITS"] else 1)
            self.rotated = self._scratch(streams, group * key_dim)
            multiplied = torch.int8 if shape["DIGITS"] else dtype
            self.operands = self._scratch(streams, 2 * rows * shape["HALF"], dtype=multiplied)
            self.factors = self._scratch(streams, 4 * shape["CLOSER_G"])
            self.closer_stats = self._scratch(streams, looks * 3 * shape["CLOSER_G"])
            self.basis = four_bit_keys.basis(key_dim, self.step.device).to(dtype)

    def place(self, layer: LayerState) -> tuple[Tensor, ...]:
        """Tensors of the method that launches for a layer read, on the device from here on."""
        method = self.step.shared.method
        tensors = method.kernel_tensors(layer.number, self.step.device)
        self.placed_by[layer.number] = method
        return tensors

    def find_outliers(self, plan: Tensor, layers: list[LayerState]) -> None:
        """Of consecutive layers, for the query that `plan` is of."""
        step = self.step
        if not self.recipe.outliers_per_1024:
            return
        for layer in layers:
            step.begin(layer)
        step.launch.find_outliers[(step.streams, len(layers))](
            step.step, step.layer_addresses, plan, self.edges, step.found_for, layers[0].number, TILE=1024,
            **some(step.shapes(layers[0]), "SUMMARY", "H", "SEGMENT", "ROWS", "PAGE", "PADDED"),
        )  # fmt: skip

    def select(
        self, layer: LayerState, query: Tensor, index: int, scale: float, new: tuple[Tensor, Tensor] | None,
        shapes: dict[str, Any],
    ) -> None:  # fmt: skip
        """List the pages of one query [B, heads, 1, Dk] of the step, and retrieve them; `new` as for `StepKernels.attend`."""
        step, recipe, number, plan = self.step, self.recipe, layer.number, self.step.plan_of(layer)[index]
        store, fields, group = layer.store, step.fields(layer), step.group
        assert store is not None
        if recipe.asks:
            states, positions = query.unflatten(1, (step.num_heads, -1)).squeeze(3), plan[:, PlanField.OWN_POSITION]
            query = step.shared.method.kernel_queries(states, positions, number).contiguous()
            group, scale = 1, 1.0
        width = query.shape[-1]
        key, value = (query, query) if new is None else new
        digits = shapes["QUANTIZED"] and step.multiplies_int8
        block_g = max(4 if digits else 8, power_of_two(group))  # columns of a product: eight at least
        closer = recipe.looked_at > 0
        closer_shape = self._closer_shape(group, store.key_dim, store.dtype)
        closer_scale = scale / math.sqrt(store.key_dim & -store.key_dim)
        bins = {"BINS": NUM_BINS, "PER_NAT": BINS_PER_NAT}
        common = {"PART": PART_PAGES, **bins, **some(shapes, "H", "PAGE", "PADDED")}
        run = min(PART_PAGES, 32)
        step.launch.score[(step.streams, self.splits + (new is not None))](
            step.step, fields, query, self.stats, plan, self.histogram, self.splits, *query.stride()[:2], scale, key, value,
            *key.stride()[:2], *value.stride()[:2], APPEND=new is not None, DIGITS=digits, G=group,
            BLOCK_G=block_g, BINS=NUM_BINS, RUNS=self._runs(width, shapes, digits), SUMMARISE=recipe.summarised_by_append,
            WEIGHTED=recipe.weighs_tokens, BOXES=recipe.rating == Rating.BOUND, SINKS=closer, ASKED=recipe.asks,
            D=width, BLOCK_D=max(32, power_of_two(width)), **shapes, num_warps=_SCORE_WARPS, num_stages=1,
        )  # fmt: skip
        step.launch.rate[(step.streams, self.programs + closer)](
            step.step, self.stats, plan, self.histogram, (self.first_floors if closer else self.floors)[number], number,
            self.splits, query, *query.stride()[:2], self.basis, self.rotated, self.operands, self.factors, closer_scale,
            self.second_histogram, RATING=int(recipe.rating), OUTLIERS=recipe.outliers_per_1024 > 0,
            EVERYTHING=self.estimates_zone, LISTED=not closer, WEIGHTED=recipe.weighs_tokens, PREPARED=closer,
            LEAST=math.log(recipe.threshold or 1.0), G=group, BLOCK_G=block_g, SPLITS=power_of_two(self.splits),
            HEADS=min(4, power_of_two(group)), RUN=run, DK=shapes["DK"], BLOCK_K=shapes["BLOCK_K"], **closer_shape, **common,
            num_warps=_RATE_WARPS,
        )  # fmt: skip
        if closer:
            self._look_closer(
                layer, plan, {"G": group, **common}, run, {**closer_shape, **some(shapes, "SEGMENT", "ROWS")}
            )
        share, lists = self.billionths(recipe), step.most_pages() or 0
        tile, few, few_tile, warps = _CHOOSE_TILE, _FEW_TIED, _FEW_TILE, _CHOOSE_WARPS
        if closer:
            tile, few, few_tile, warps = _LOOKED_AT_TILE, _LOOKED_AT_TIED, _LOOKED_AT_FEW_TILE, _LOOKED_AT_WARPS
        step.launch.choose[(step.streams,)](
            step.step, fields, plan, self.second_histogram if closer else self.histogram, self.list_count,
            step.counters[number], self.floors[number], self.hands[number], self.zone_edges, share, index,
            COMPLETE=closer, COUNTED=self.estimates_zone, ESTIMATES=share > 0, ZONE=self.estimates_zone, G=group,
            PAGE_BYTES=store.form.row_bytes, TILE=tile, PARTS=_CHOOSE_PARTS, KEPT=_KEPT, FEW=few, FEW_TILE=few_tile,
            TIED_TILE=_TIED_TILE, LIST_TILE=2 * _LIST_TILE if lists > _LIST_TILE else _LIST_TILE, HAND_TILE=_HAND_TILE,
            SLOT_TILE=_SLOT_TILE, **common, num_warps=warps,
        )  # fmt: skip

    @staticmethod
    def billionths(recipe: Recipe) -> int:
        """The share that is estimated, as kernels are told: 0 only where nothing is."""
        return max(round(recipe.estimated_share * 1e9), int(recipe.estimated_share > 0))

    @property
    def estimates_zone(self) -> bool:
        """Whether only some of what is not chosen is estimated."""
        return 0 < self.recipe.estimated_share < 1

    def _look_closer(
        self, layer: LayerState, plan: Tensor, common: dict[str, Any], run: int, shapes: dict[str, Any]
    ) -> None:
        """Rate the pages again that are best by one vector."""
        step, store, floors = self.step, layer.store, self.first_floors[layer.number]
        assert store is not None
        code_bytes, looked_at = -(-store.key_dim // 2), self.recipe.looked_at
        step.launch.closer[(step.streams, self.programs)](
            step.step, step.fields(layer), self.operands, self.factors, plan, self.histogram, floors, self.closer_stats,
            LOOKED_AT=looked_at, DK=store.key_dim, RUN=run, TILE=max(1, _CLOSER_TOKENS // store.page_size),
            ALIGNED=min(16, code_bytes & -code_bytes), EXCESS=MOST_EXCESS, **shapes, **common, num_warps=_CLOSER_WARPS,
            num_stages=1,
        )  # fmt: skip
        step.launch.rate_closer[(step.streams, self.programs)](
            step.step, plan, self.histogram, floors, self.second_histogram, self.factors, self.closer_stats, self.programs,
            LOOKED_AT=looked_at, COUNTED=_COUNTED, CLOSER_G=shapes["CLOSER_G"], LOOKS=power_of_two(self.programs),
            TILE=256, **common, num_warps=4,
        )  # fmt: skip

    def _closer_shape(self, group: int, key_dim: int, dtype: torch.dtype) -> dict[str, Any]:
        """How codes are multiplied: as int8, and how many query heads and bytes of a key an operand is made up to."""
        digits = self.step.multiplies_int8 and dtype != torch.float32
        return {
            "DIGITS": digits, "CLOSER_G": max(4 if digits else 8, power_of_two(group)),
            "HALF": max(32 if digits else 16, power_of_two(-(-key_dim // 2))),
        }  # fmt: skip

    def _runs(self, width: int, shapes: dict[str, Any], digits: bool) -> int:
        """Segments that a program scores at a time, by the bytes of their vectors; fewer where shared memory is small."""
        item = 1 if shapes["QUANTIZED"] else shapes["SUMMARY"].primitive_bitwidth // 8
        if self.recipe.asks and not digits:
            item = 4  # vectors are converted
        vectors = 2 if self.recipe.rating == Rating.BOUND else 1
        return segments_at_a_time(vectors * max(32, power_of_two(width)), item, self.step.shared_memory)

    def _scratch(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.step.device)


def segments_at_a_time(width: int, item: int, shared_memory: int) -> int:
    """Segments whose vectors, of so many numbers of so many bytes, a program reads at a time."""
    segment = SEGMENT_PAGES * width
    room = shared_memory // (4 * segment * max(2, item))  # vectors may be converted
    return power_of_two(max(1, min(_SCORE_BYTES // (segment * item), room)) + 1) // 2


def some(shapes: dict[str, Any], *names: str) -> dict[str, Any]:
    """Those with these names."""
    return {name: shapes[name] for name in names}
