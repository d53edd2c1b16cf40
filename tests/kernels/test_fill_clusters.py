"""Clustering by kernels, interpreted on the CPU, against loops and `kernels/reference_clustering.py`.

Uninitialised memory holds NaN, and numbers far outside of all tables.
"""

from __future__ import annotations

import os
import sys
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spin_hf.attention.methods.retroinfer import RetroInfer
from spin_hf.kernels import reference_clustering
from spin_hf.kernels.reference_clustering import LIKENESS_STEPS, ROUNDS
from spin_hf.storage.token_permutation import tiles

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu runs the kernels themselves"),
]

FAR = -(1 << 30)
FLOATS = (torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def _poison() -> Any:
    """`torch.empty` gives NaN and FAR."""
    empty = torch.empty

    def poisoned(*args: Any, **options: Any) -> Tensor:
        made = empty(*args, **options)
        return made.fill_(float("nan") if made.dtype.is_floating_point else FAR)

    with patch.object(torch, "empty", poisoned):
        yield


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(random(*shape, seed=seed), dim=-1)


# ---------------------------------------------------------------------------------------------------- one kernel at a time


class Rows:
    """Points of which only some count, followed by NaN in memory; `listed` ones are at any place."""

    def __init__(self, count: int, dim: int, alive: list[int], cluster_tokens: int, listed: bool, dtype: torch.dtype):
        rows, self.count, self.length = len(alive), count, 2 * count if listed else count
        self.alive, self.most, self.listed = alive, max(1, count // cluster_tokens), listed
        self.wanted = [max(1, number // cluster_tokens) for number in alive]
        self.all = torch.full((rows, self.length, dim), float("nan"), dtype=dtype)
        self.tokens = torch.full((rows, count), FAR, dtype=torch.int32)
        self.points = []
        for row, number in enumerate(alive):
            where = torch.randperm(self.length)[:number] if listed else torch.arange(number)
            self.points.append(unit(number, dim, seed=row).to(dtype))
            self.all[row, where], self.tokens[row, :number] = self.points[row], where.int()
        self.done = torch.tensor([self.length - number for number in alive], dtype=torch.int32)
        self.centroids = torch.full((rows, self.most, dim), float("nan"), dtype=dtype)
        for row, wanted in enumerate(self.wanted):
            self.centroids[row, :wanted] = unit(wanted, dim, seed=100 + row).to(dtype)
        self.sizes = torch.zeros((rows, self.most), dtype=torch.int32)
        self.constants: dict[str, Any] = dict(
            CLUSTER_TOKENS=cluster_tokens, D=dim, BLOCK_D=max(16, 1 << (dim - 1).bit_length()), LISTED=listed
        )

    @property
    def given(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.all, self.tokens, self.done

    @property
    def sized(self) -> tuple[int, int, int]:
        return self.length, self.count, self.most


ROWS = [
    (70, 20, [70, 33, 0, 1], 16),  # 4, 2, 1 and 1 clusters; a tile is not full, a row empty
    (33, 16, [33], 33),  # one cluster
    (90, 5, [90, 8], 2),  # 45 clusters: more than a tile, and not a multiple of 16
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(("count", "dim", "alive", "cluster_tokens"), ROWS)
@pytest.mark.parametrize(("start", "step", "final"), [(0, 2, False), (1, 2, False), (0, 1, True)])
def test_nearest(
    count: int, dim: int, alive: list[int], cluster_tokens: int, listed: bool, dtype: torch.dtype,
    start: int, step: int, final: bool,
) -> None:  # fmt: skip
    from spin_hf.kernels.indexing.kmeans import nearest_kernel

    rows = Rows(count, dim, alive, cluster_tokens, listed, dtype)
    own = torch.full((len(alive), count), FAR, dtype=torch.int32)
    nearest_kernel[(len(alive), -(-count // (32 * step)))](
        *rows.given, rows.centroids, own, rows.sizes, *rows.sized, start, **rows.constants,
        LIKENESS_STEPS=LIKENESS_STEPS, TILE=32, CLUSTERS=32, STEP=step, FINAL=final,
    )  # fmt: skip
    rerank_factor = torch.arange(count) % step == start if step > 1 else torch.ones(count, dtype=torch.bool)
    assert bool((own[:, ~rerank_factor] == FAR).all())
    for row, number in enumerate(alive):
        found = own[row].long()
        if final:
            found -= row * (rows.most + 1) * LIKENESS_STEPS
            found, steps = found // LIKENESS_STEPS, found % LIKENESS_STEPS
        assert bool((found[number:][rerank_factor[number:]] == rows.most).all())
        products = rows.points[row].double() @ rows.centroids[row, : rows.wanted[row]].double().mT
        if not number:
            assert not int(rows.sizes[row].sum())
            continue
        best = products.max(1).values
        mine = rerank_factor[:number]
        chosen = products.gather(1, found[:number].clamp(0, rows.wanted[row] - 1).unsqueeze(1)).squeeze(1)
        assert bool((found[:number][mine] < rows.wanted[row]).all())
        assert bool(((best - chosen)[mine] < 1e-6).all())
        if final:
            assert float((1 - best - 2 / LIKENESS_STEPS * (steps[:number] + 0.5)).abs().max()) < 1.01 / LIKENESS_STEPS
            assert torch.equal(rows.sizes[row].long(), found[:number].bincount(minlength=rows.most))


def test_the_first_of_equal_centroids_is_nearest() -> None:
    """Within a tile of them and across, and of what is no number the first of all."""
    from spin_hf.kernels.indexing.kmeans import nearest_kernel

    rows = Rows(80, 8, [80, 80], 1, False, torch.float32)
    rows.centroids.zero_()
    rows.centroids[0, [3, 5, 40, 79], 2] = 1.0
    rows.all.zero_()
    rows.all[0, :, 2] = 0.5
    rows.all[1] = float("nan")
    own = torch.full((2, 80), FAR, dtype=torch.int32)
    nearest_kernel[(2, 3)](
        *rows.given, rows.centroids, own, rows.sizes, *rows.sized, 0, **rows.constants,
        LIKENESS_STEPS=LIKENESS_STEPS, TILE=32, CLUSTERS=32, STEP=1, FINAL=True,
    )  # fmt: skip
    half, none = LIKENESS_STEPS // 4, LIKENESS_STEPS // 2
    assert own[0].tolist() == [3 * LIKENESS_STEPS + half] * 80
    assert own[1].tolist() == [81 * LIKENESS_STEPS + none] * 80


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize(("count", "dim", "alive", "cluster_tokens"), ROWS)
def test_average(
    count: int, dim: int, alive: list[int], cluster_tokens: int, start: int, listed: bool, dtype: torch.dtype
) -> None:
    from spin_hf.kernels.indexing.kmeans import average_kernel

    rows = Rows(count, dim, alive, cluster_tokens, listed, dtype)
    own = torch.full((len(alive), count), FAR, dtype=torch.int32)
    before, others = rows.centroids.clone(), random(*rows.centroids.shape, seed=3)
    others[:, 1::2] = 0  # there a cluster may have no points at all
    for row, number in enumerate(alive):
        own[row, :number] = torch.arange(number) * 7 % max(1, rows.wanted[row] - 1)
    sums = torch.full(rows.centroids.shape, float("nan"))
    average_kernel[(len(alive), -(-rows.most // 32))](
        *rows.given, own, sums, others, rows.centroids, *rows.sized, start, **rows.constants,
        TILE=32, CLUSTERS=32, STEP=2, ALONE=start == 1,
    )  # fmt: skip
    for row in range(len(alive)):
        for cluster in range(rows.most):
            if cluster >= rows.wanted[row]:
                assert bool(rows.centroids[row, cluster].isnan().all() and sums[row, cluster].isnan().all())
                continue
            members = [i for i in range(start, alive[row], 2) if int(own[row, i]) == cluster]
            total = rows.points[row][members].double().sum(0)
            torch.testing.assert_close(sums[row, cluster].double(), total, rtol=1e-6, atol=1e-6)
            total = total if start == 1 else total + others[row, cluster].double()
            mean = total / total.norm() if float(total.norm()) else before[row, cluster].double()
            close = dict(rtol=0, atol=1e-3 if dtype == torch.float16 else 1e-6)
            torch.testing.assert_close(rows.centroids[row, cluster].double(), mean, **close)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(("count", "dim", "alive", "cluster_tokens"), ROWS)
def test_seeds(count: int, dim: int, alive: list[int], cluster_tokens: int, listed: bool) -> None:
    from spin_hf.kernels.indexing.kmeans import seed_kernel

    rows = Rows(count, dim, alive, cluster_tokens, listed, torch.float32)
    rows.centroids.fill_(FAR)
    rows.sizes.fill_(FAR)
    seed_kernel[(len(alive), -(-rows.most // 32))](
        *rows.given, rows.centroids, rows.sizes, *rows.sized, **rows.constants, CLUSTERS=32
    )
    assert not bool(rows.sizes.any())
    for row, (number, wanted) in enumerate(zip(alive, rows.wanted, strict=True)):
        at = [(2 * i + 1) * number // (2 * wanted) for i in range(wanted)] if number else []
        assert torch.equal(rows.centroids[row, : len(at)], rows.points[row][at])
        assert bool((rows.centroids[row, len(at) :] == FAR).all())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [3, 8, 80])
def test_unit_vectors(dim: int, dtype: torch.dtype) -> None:
    """Of keys with gaps between them, with heads before spans, or with a key's numbers apart."""
    from spin_hf.kernels.indexing.fill_clusters import unit_vectors

    whole = random(3, 2, 17, 2, dim + 3) * 4 + 1
    whole[1, 1] = 2.5  # all keys alike
    for keys in (whole[..., 0, :dim].transpose(0, 1), whole[..., 1, :dim].mT.contiguous().mT):
        points = unit_vectors(keys.half().to(dtype), dtype)
        expected = reference_clustering.unit_vectors(keys.half().double(), torch.float64)
        assert points.is_contiguous()
        torch.testing.assert_close(points.double(), expected, rtol=0, atol=1e-3 if dtype == torch.float16 else 1e-6)


# -------------------------------------------------------------------------------------------------------- all of it at once


def by_kernels(points: Tensor, cluster_tokens: int) -> tuple[Tensor, Tensor]:
    from spin_hf.kernels.indexing.fill_clusters import fill_clusters

    return fill_clusters(points, ROUNDS, cluster_tokens, 8, LIKENESS_STEPS)


@pytest.mark.parametrize(
    ("rows", "count", "dim", "cluster_tokens"),
    [(3, 8, 4, 16), (2, 24, 6, 40), (2, 160, 12, 8), (3, 176, 16, 16), (1, 72, 3, 100)],
)
def test_clusters_are_those_of_the_formulas(rows: int, count: int, dim: int, cluster_tokens: int) -> None:
    points = unit(rows, count, dim, seed=count)
    for actual, expected in zip(
        by_kernels(points, cluster_tokens), reference_clustering.fill_clusters(points, cluster_tokens, 8), strict=True
    ):
        assert actual.dtype == torch.int64
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    "points", [torch.zeros((2, 64, 4)), torch.full((1, 160, 4), float("nan"))], ids=["equal", "nan"]
)
def test_points_that_do_not_differ(points: Tensor) -> None:
    order, pages = by_kernels(points, 16)
    assert torch.equal(order.sort(1).values, torch.arange(points.shape[1]).expand_as(order))
    assert tiles(pages.unsqueeze(0))
    assert pages[0, 0] == points.shape[1] // 8
    assert torch.equal(order[0], torch.arange(points.shape[1]))


def test_points_in_sixteen_bits_make_clusters_as_good() -> None:
    """Planted ones: pages are as much alike as those by float32 are."""
    label = torch.randint(0, 20, (2, 400), generator=torch.Generator().manual_seed(6))
    points = torch.nn.functional.normalize(random(20, 16)[label] + random(2, 400, 16, seed=7), dim=-1)
    lengths = []
    for order, pages in (by_kernels(points.half(), 16), reference_clustering.fill_clusters(points, 16, 8)):
        assert tiles(pages.unsqueeze(0))
        sorted_points = points.gather(1, order.unsqueeze(-1).expand_as(points)).unflatten(1, (-1, 8))
        lengths.append(float(sorted_points.mean(2).norm(dim=-1).mean()))
    consecutive = float(points.unflatten(1, (-1, 8)).mean(2).norm(dim=-1).mean())
    assert abs(lengths[0] - lengths[1]) < 0.03 * (lengths[1] - consecutive)


def test_numbers_beyond_thirty_one_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of very many rows: the same order from numbers of 64 bits, here by finer steps."""
    from spin_hf.kernels.indexing.fill_clusters import fill_clusters

    fine = 1 << 27
    monkeypatch.setattr(reference_clustering, "LIKENESS_STEPS", fine)
    points = unit(2, 160, 6, seed=9)
    for actual, expected in zip(
        fill_clusters(points, ROUNDS, 16, 8, fine), reference_clustering.fill_clusters(points, 16, 8), strict=True
    ):
        assert torch.equal(actual, expected)


class Operations(TorchDispatchMode):
    """Names of PyTorch's operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        if name not in ("empty", "view", "_unsafe_view", "select", "slice", "detach", "alias", "t", "unsafe_view"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_launches_do_not_depend_on_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """21 kernels, and of PyTorch's operations a mean, fills of tables and two sorts; nothing that waits for the device."""
    from spin_hf.kernels.indexing import fill_clusters
    from spin_hf.kernels.triton_launchers import launchers

    monkeypatch.setattr("spin_hf.kernels.launchers", lambda device: launchers)
    launched: list[str] = []

    class Counted:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: launched.append(self.name)

    for name in ("unit_vectors", "seed", "nearest", "average", "plan", "place"):
        monkeypatch.setattr(fill_clusters, f"{name}_kernel", Counted(name))
    for spans in (1, 3):
        launched.clear()
        keys = random(spans, 2, 160, 8)
        with Operations() as operations:
            RetroInfer().form_clusters(keys, None)
        assert sorted(set(launched)) == ["average", "nearest", "place", "plan", "seed", "unit_vectors"]
        assert len(launched) == 1 + 2 + (4 + 2) * 2 + 2 + 2 * 2
        assert sorted(name for name in operations.names if name != "fill_") == [
            "mean",
            "sort",
            "sort",
            "zeros",
            "zeros",
        ]
