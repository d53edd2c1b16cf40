"""Clusters of full pages, without host synchronization. The specification is `reference_clustering.fill_clusters`.

A round clusters the points that are not placed yet, in these launches (see `kmeans.py`):

    seed  ->  nearest, average  ->  ...  ->  nearest  ->  sort  ->  plan  ->  place
              once per iteration             sort keys    once      where     full pages to their places;
                                                                    each      left-over points to the next round,
                                                                    begins    in the last round to pages in order

    numbers [R, m]          sort keys (r * (most + 1) + cluster) * LIKENESS_STEPS + step: one sort serves all rows
    tables [R, 3, most]     first place of each cluster: in the sorted row, in `order`, and among the left-over points
    done [rounds + 1, R]    points placed before each round; `length - done` remain
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import device_limits
from ..compile_ahead import launch_now
from ..device_guard import on_device_of
from .kmeans import average_kernel, nearest_kernel, seed_kernel, unit_vectors_kernel

_HALF = 2
"""An iteration assigns every second point."""
_PLACES = 512
"""Points that a program places."""


def unit_vectors(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """As `reference_clustering.unit_vectors`: [S, H, n, D] in `dtype`."""
    if keys.stride(-1) != 1:
        keys = keys.contiguous()
    spans, heads, count, dim = keys.shape
    points = torch.empty(keys.shape, dtype=dtype, device=keys.device)
    mean = keys.mean(2, dtype=torch.float32)
    tile = max(1, 4096 // triton.next_power_of_2(dim))
    with on_device_of(keys):
        launch_now(
            unit_vectors_kernel, (spans * heads, triton.cdiv(count, tile)), keys, mean, points, count, heads,
            *keys.stride()[:3], D=dim, BLOCK_D=triton.next_power_of_2(dim), TILE=tile,
        )  # fmt: skip
    return points


def fill_clusters(
    points: Tensor, rounds: Sequence[int], cluster_tokens: int, page_size: int, likeness_steps: int
) -> tuple[Tensor, Tensor]:
    """As `reference_clustering.fill_clusters`.

    Args:
        points: [R, n, D], float16 or float32, contiguous.
        rounds: iterations of each round; at least one round.
    """
    rows, length, dim = points.shape
    device = points.device
    order = torch.empty((rows, length), dtype=torch.int64, device=device)
    pages = torch.zeros((rows, length // page_size), dtype=torch.int64, device=device)
    done = torch.zeros((len(rounds) + 1, rows), dtype=torch.int32, device=device)
    tokens, count = done, length  # a placeholder: the first round does not read `tokens`
    constants = dict(D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), CLUSTER_TOKENS=cluster_tokens)
    near, mean = _tiles(device_limits.multiplies(device) and points.dtype == torch.float16, constants["BLOCK_D"])
    with on_device_of(points):
        for number, iterations in enumerate(rounds):
            most, last = max(1, count // cluster_tokens), number == len(rounds) - 1
            common: dict[str, Any] = dict(constants, LISTED=number > 0)
            given, sized = (points, tokens, done[number]), (length, count, most)
            centroids = torch.empty((rows, most, dim), dtype=points.dtype, device=device)
            sums = torch.empty((2, rows, most, dim), dtype=torch.float32, device=device)
            sizes = torch.empty((rows, most), dtype=torch.int32, device=device)
            own = torch.empty((rows, count), dtype=torch.int32, device=device)
            seeds = rows, triton.cdiv(most, 32)
            launch_now(seed_kernel, seeds, *given, centroids, sizes, *sized, **common, CLUSTERS=32)
            for step in range(iterations):
                half = step % _HALF
                launch_now(
                    nearest_kernel, (rows, triton.cdiv(triton.cdiv(count, _HALF), near["TILE"])), *given, centroids, own, sizes,
                    *sized, half, **common, **near, LIKENESS_STEPS=likeness_steps, STEP=_HALF, FINAL=False,
                )  # fmt: skip
                launch_now(
                    average_kernel, (rows, triton.cdiv(most, mean["CLUSTERS"])), *given, own, sums[half], sums[1 - half],
                    centroids, *sized, half, **common, **mean, STEP=_HALF, ALONE=step == 0,
                )  # fmt: skip
            small = rows * (most + 1) * likeness_steps <= 1 << 31
            numbers = torch.empty((rows, count), dtype=torch.int32 if small else torch.int64, device=device)
            launch_now(
                nearest_kernel, (rows, triton.cdiv(count, near["TILE"])), *given, centroids, numbers, sizes, *sized, 0,
                **common, **near, LIKENESS_STEPS=likeness_steps, STEP=1, FINAL=True,
            )  # fmt: skip
            numbers, index = numbers.view(-1).sort(stable=True)
            block = triton.next_power_of_2(most)
            tables = torch.empty((rows, 3, most), dtype=torch.int32, device=device)
            launch_now(
                plan_kernel, (rows,), sizes, done[number], done[number + 1], tables, pages, length, most,
                PAGE=page_size, BLOCK=block, LAST=last, num_warps=min(16, max(4, block // 256)),
            )  # fmt: skip
            width = min(count, most * (page_size - 1))
            left = torch.empty((rows, width), dtype=torch.int32, device=device)
            launch_now(
                place_kernel, (rows, triton.cdiv(count, _PLACES)), numbers, index, sizes, tables, tokens, done[number + 1],
                left, order, length, count, width, most, PAGE=page_size,
                LIKENESS_STEPS=likeness_steps, TILE=_PLACES, LISTED=number > 0, LAST=last,
            )  # fmt: skip
            tokens, count = left, width
    return order, pages


def _tiles(tensor_cores: bool, dim: int) -> tuple[dict[str, int], dict[str, int]]:
    """Launch options of `nearest` and of `average`, chosen to fit registers and shared memory.

    Args:
        tensor_cores: whether products run on tensor cores: float16, on Ampere or later.
    """
    if not tensor_cores:
        small = dict(TILE=32, CLUSTERS=32, num_warps=4, num_stages=1)
        return small, small
    if dim <= 128:
        return (
            dict(TILE=128, CLUSTERS=64, num_warps=8, num_stages=3), dict(TILE=64, CLUSTERS=128, num_warps=8, num_stages=4),
        )  # fmt: skip
    return dict(TILE=64, CLUSTERS=32, num_warps=4, num_stages=2), dict(TILE=32, CLUSTERS=64, num_warps=8, num_stages=2)


@triton.jit(do_not_specialize=["length", "most"])
def plan_kernel(
    sizes, done, next_done, tables, pages, length, most, PAGE: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr
):
    """Program r finds where the clusters of row r begin, and which pages they get.

    Args:
        sizes: int32 [R, most].
        tables: int32 [R, 3, most]; next_done: int32 [R]. Written.
        pages: int64 [R, length / PAGE]: pages per cluster, at the cluster's first page. Written; if LAST, also 1 for each page
            after all clusters.
    """
    row = tl.program_id(0).to(tl.int64)
    cluster = tl.arange(0, BLOCK)
    inside = cluster < most
    size = tl.load(sizes + row * most + cluster, mask=inside, other=0)
    whole = size // PAGE
    rest = size - whole * PAGE
    before = tl.load(done + row)
    page = before // PAGE + tl.cumsum(whole, 0) - whole
    table = tables + row * 3 * most + cluster
    tl.store(table, tl.cumsum(size, 0) - size, mask=inside)
    tl.store(table + most, page * PAGE, mask=inside)
    tl.store(table + 2 * most, tl.cumsum(rest, 0) - rest, mask=inside)
    num_pages = length // PAGE
    tl.store(pages + row * num_pages + page, whole.to(tl.int64), mask=inside & (whole > 0))
    filled = before // PAGE + tl.sum(whole, 0)
    tl.store(next_done + row, filled * PAGE)
    if LAST:
        for first in range(filled, num_pages, BLOCK):
            single = first + cluster
            tl.store(pages + row * num_pages + single, tl.full([BLOCK], 1, tl.int64), mask=single < num_pages)


@triton.jit(do_not_specialize=["length", "count", "width", "most"])
def place_kernel(
    numbers, index, sizes, tables, tokens, next_done, left, order, length, count, width, most,
    PAGE: tl.constexpr, LIKENESS_STEPS: tl.constexpr, TILE: tl.constexpr, LISTED: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Program (r, i) places TILE of the sorted points of row r.

    Args:
        numbers: [R * count], sorted keys; index: int64 [R * count], the position of each key before the sort.
        left: int32 [R, width]: left-over tokens, which do not fill a page of their cluster. Written unless LAST.
        order: int64 [R, length]: all other tokens; with LAST also the left-over ones. Written.
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = place < count
    number = tl.load(numbers + row * count + place, mask=inside, other=0).to(tl.int64)
    cluster = number // LIKENESS_STEPS - row * (most + 1)
    alive = inside & (cluster < most)
    token = tl.load(index + row * count + place, mask=alive, other=0) - row * count
    if LISTED:
        token = tl.load(tokens + row * count + token, mask=alive, other=0).to(tl.int64)
    table = tables + row * 3 * most + cluster
    place -= tl.load(table, mask=alive, other=0)
    filled = tl.load(sizes + row * most + cluster, mask=alive, other=0) // PAGE * PAGE
    kept = alive & (place < filled)
    tl.store(order + row * length + tl.load(table + most, mask=kept, other=0) + place, token, mask=kept)
    rest = alive & (place >= filled)
    to = tl.load(table + 2 * most, mask=rest, other=0) + place - filled
    if LAST:
        tl.store(order + row * length + tl.load(next_done + row) + to, token, mask=rest)
    else:
        tl.store(left + row * width + to, token.to(tl.int32), mask=rest)
