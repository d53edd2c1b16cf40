"""Points bisected by the kernels, interpreted on the CPU: the halves of each level must lie on either side of their axis."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from torch import Tensor

from spin_hf.kernels import reference_clustering

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu runs the kernels themselves"),
]


def check_levels(points: Tensor, order: Tensor, page_size: int) -> None:
    """Whether at each level each lower half is lower along the main axis, by float64."""
    rows, count, _ = points.shape
    assert torch.equal(order.sort(1).values, torch.arange(count).expand(rows, -1))
    size = page_size
    while size < count:
        size *= 2
    while size > page_size:
        for row in range(rows):
            for first in range(0, count - size // 2, size):
                own = points[row, order[row, first : first + size]].double()
                own = own - own.mean(0)
                spread, axes = torch.linalg.eigh(own.mT @ own)
                along = own @ axes[:, -1]
                lower, upper = along[: size // 2], along[size // 2 :]
                wrong = min(float(lower.max() - upper.min()), float((-lower).max() - (-upper).min()))
                assert wrong <= 1e-3 * float(along.abs().max()), (row, first, size, spread[-2:])
        size //= 2


def separated(rows: int, count: int, dim: int) -> Tensor:
    """Points whose halves, down to pages of 8, have one main axis each that is much longer than the others."""
    generator = torch.Generator().manual_seed(count + dim)
    place = torch.stack([torch.randperm(count, generator=generator) for _ in range(rows)])
    points = 1e-4 * torch.randn((rows, count, dim), generator=generator)
    width, bit = 1.0, 1
    while bit < count:
        bit *= 2
    axis = 0
    while bit > 8:
        bit //= 2
        points[..., axis % dim] += width * torch.where((place // bit) % 2 == 1, 1.0, -1.0)
        width, axis = width / 2, axis + 1
    return points + torch.randn((rows, 1, dim), generator=generator)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of more than 256 points count as large."""
    monkeypatch.setattr("spin_hf.kernels.indexing.bisect._CHUNK", 256)


@pytest.mark.parametrize(
    ("rows", "count", "dim"),
    [(1, 1024, 16), (2, 640, 20), (3, 136, 16), (2, 64, 16), (1, 16, 16), (2, 8, 4), (1, 776, 8)],
)
def test_halves(rows: int, count: int, dim: int) -> None:
    from spin_hf.kernels.indexing.bisect import bisect

    points = separated(rows, count, dim)
    order = bisect(points, 8)
    check_levels(points, order, 8)
    expected = reference_clustering.bisect(points, 8)
    pages, wanted = (found.unflatten(1, (-1, 8)).sort(2).values for found in (order, expected))
    same = (pages == wanted).all(2).float().mean()
    assert same > 0.9 or torch.equal(pages.flatten(1, 2).sort(1).values, wanted.flatten(1, 2).sort(1).values)


@pytest.mark.parametrize("count", [256, 600])
def test_equal_points_keep_their_order(count: int) -> None:
    from spin_hf.kernels.indexing.bisect import bisect

    assert torch.equal(bisect(torch.ones((1, count, 16)), 8)[0], torch.arange(count))
