"""Bisection against an oracle in float64, written from its documentation.

    rate       log of tokens * exp(scale * q . mean). The 8 x budget pages with the highest probabilities, and those in the same
               64th of a nat as the last of them, are reranked: log of the sum over their tokens of exp(scale * q . (mean + four
               bits)). Probabilities are among all candidates and sinks, by the same rating, summed over the group.
    estimate   every other page: tokens * exp(scale * q . mean key), mean value. The weight of a reranked page is that of its
               rating, limited to between once and exp(4) times the estimate.

The mean of keys has eight bits everywhere. The tokens of each page are read back from the cache.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from spin_hf import Bisection, OptionError, OptionTypeError
from spin_hf.attention.methods import four_bit_keys
from spin_hf.attention.methods.bisection import POINT_DIM, as_points
from spin_hf.kernels import bisect
from tests.support.cache_driver import Shape, poisoned_memory, smallest_gpu_memory
from tests.support.clustered_oracle import Head, compare_with_clustered_oracle, softmax_over, zones_of
from tests.support.clustered_pages import span_ends
from tests.support.clustering_methods import clustering_often, little_slack
from tests.support.conversation import random_pages, single_steps, without_near_ties
from tests.support.oracle import NearTieError, Rules

MARGIN = 1e-6
RULES = Rules(budget=24, num_sink_tokens=4, recent_window=10)


Small = clustering_often(Bisection, 96, 32)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory(), little_slack():
        yield


def in_four_bits(vectors: np.ndarray) -> np.ndarray:
    """Of each of [N, D], the best of six roundings to odd multiples of half a step, by squared error; bfloat16 steps."""
    size = np.sqrt((vectors**2).mean(1, keepdims=True))
    best, error, step = np.zeros_like(vectors), np.full_like(size, np.inf), np.zeros_like(size)
    for multiple in (0.25, 0.3, 0.335, 0.4, 0.5, 0.65):
        tried = np.where(size > 0, size, 1.0) * multiple
        levels = np.clip(np.round(vectors / tried + 7.5), 0, 15) - 7.5
        off = ((levels * tried - vectors) ** 2).sum(1, keepdims=True)
        best, step, error = (
            np.where(off < error, levels, best),
            np.where(off < error, tried, step),
            np.minimum(off, error),
        )
    return np.where(size > 0, best * torch.from_numpy(step).bfloat16().double().numpy(), vectors)


@functools.cache
def basis_of(dim: int) -> np.ndarray:
    return four_bit_keys.rotate(torch.eye(dim)).double().numpy()


@functools.lru_cache(1 << 14)  # most pages are rated by many queries
def page_of(contents: bytes, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the keys of a page: their mean in eight bits [D], and the keys in four bits around it [n, D]."""
    keys = np.frombuffer(contents).reshape(-1, dim)
    mean, basis = in_eight_bits(keys.mean(0)), basis_of(dim)
    return mean, mean + in_four_bits((keys - mean) @ basis) @ basis.T


def in_eight_bits(vector: np.ndarray) -> np.ndarray:
    """Integers up to 127 times one step."""
    unit = float(np.abs(vector).max()) / 127
    levels = vector / unit
    if np.abs(np.abs(levels - np.floor(levels)) - 0.5).min() < 1e-4:
        raise NearTieError("eight bits")
    return np.round(levels) * unit


def shares(log_weights: np.ndarray) -> np.ndarray:
    """[G, N] to [N]."""
    weights = np.exp(log_weights - log_weights.max(1, keepdims=True))
    return (weights / weights.sum(1, keepdims=True)).sum(0)


def best(scores: dict[int, float], count: int) -> list[int]:
    order = sorted(scores, key=lambda page: -scores[page])
    if 0 < count < len(order) and scores[order[count - 1]] - scores[order[count]] < MARGIN:
        raise NearTieError("pages")
    return order[:count]


def down_to(scores: dict[int, float], count: int, group: int) -> list[int]:
    """The best pages, and those whose mean probability is in the same of 64 steps of a nat as the last of them."""
    steps = {page: -64 * math.log(score / group) for page, score in scores.items()}
    order = sorted(steps, key=lambda page: steps[page])
    edge = math.floor(steps[order[min(count, len(order)) - 1]]) + 1
    if count < len(order) and any(abs(step - bound) < 1e-3 for step in steps.values() for bound in (edge - 1, edge)):
        raise NearTieError("bins")
    return [page for page in order if steps[page] < edge]


def bounded(more: float) -> float:
    """What a close look may add to the logarithm of a weight."""
    return min(max(more, 0.0), 4.0)


def expect(rules: Rules, method: Bisection, head: Head, query: np.ndarray, at: int, sinks: Any) -> np.ndarray:
    zones = zones_of(rules, head, at)
    assert all(len(cluster) == 1 for cluster in zones.clusters)
    pages = [page for (page,) in zones.clusters]
    exact, estimated = [token for page in zones.always for token in zones.held[page]], []
    logit_correction: list[list[float]] = [[] for _ in query]
    if pages:
        rated_pages = [page for page in sorted(zones.always) if page < pages[0]] + pages
        tokens = {page: zones.held[page] for page in rated_pages if zones.held[page]}
        rated_pages = list(tokens)
        pair = {page: page_of(head.keys[held].tobytes(), head.keys.shape[1]) for page, held in tokens.items()}
        mean = {page: first for page, (first, _) in pair.items()}
        counts = np.array([len(tokens[page]) for page in rated_pages])
        rated = rules.scale * query @ np.array([mean[page] for page in rated_pages]).T + np.log(counts)
        by_means = rated.copy()
        candidates = {page: share for page, share in zip(rated_pages, shares(rated), strict=True) if page in pages}
        rerank_factor = down_to(candidates, method.rerank_factor * zones.room, len(query))
        for page in rated_pages:
            if page in pages and page not in rerank_factor:
                continue
            rated[:, rated_pages.index(page)] = np.log(np.exp(rules.scale * query @ pair[page][1].T).sum(1))
        found = dict(zip(rated_pages, shares(rated), strict=True))
        chosen = best({page: found[page] for page in rerank_factor}, zones.room)
        exact += [token for page in chosen for token in tokens[page]]
        for page in pages:
            if page not in chosen:
                estimated.append((len(tokens[page]), mean[page], np.mean(head.values[tokens[page]], axis=0)))
                more = rated[:, rated_pages.index(page)] - by_means[:, rated_pages.index(page)]
                for g in range(len(query)):
                    logit_correction[g].append(bounded(float(more[g])))
    sinks = [None] * len(query) if sinks is None else sinks
    each = zip(query, sinks, logit_correction, strict=True)
    return np.array([softmax_over(rules, head, q, exact, estimated, sink, more) for q, sink, more in each])


@pytest.mark.parametrize(("group", "rerank_factor"), [(1, 1), (1, 4), (3, 2)])
def test_choice_and_estimate(group: int, rerank_factor: int) -> None:
    def run(seed: int) -> None:
        kv = random_pages(Shape(layers=2, kv_heads=2, group=group, value_dim=6), 2, 190, seed)
        driver = compare_with_clustered_oracle(expect, Small(rerank_factor), kv, RULES, single_steps(182, 186))
        assert len(span_ends(driver)) == 2
        assert driver.cache.stats().attended_tokens < 60

    without_near_ties(run)


@pytest.mark.parametrize("length", [0.2, 6.0])
def test_bounds_of_what_a_rerank_adds(length: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With short keys four bits err by more than tokens of a page differ; with long ones these differ by many nats."""
    found: list[float] = []
    monkeypatch.setitem(globals(), "bounded", lambda more, bound=bounded: (found.append(more), bound(more))[1])

    def run(seed: int) -> None:
        kv = random_pages(Shape(layers=1), 1, 190, seed)
        for keys in kv.keys:
            keys *= length
        compare_with_clustered_oracle(expect, Small(4), kv, RULES, single_steps(182, 185))

    without_near_ties(run)
    assert min(found) < 0 if length < 1 else max(found) > 4


def test_growing_padded_in_several_queries() -> None:
    def run(seed: int) -> None:
        valid = torch.ones((3, 150), dtype=torch.bool)
        valid[0, 33:70], valid[1, 20:130:3], valid[2, :21], valid[2, 146] = False, False, False, False
        steps = [(stop, valid[:, :stop]) for stop in (90, 91, 106, 122, 138, 150)]
        driver = compare_with_clustered_oracle(
            expect, Small(), random_pages(Shape(key_dim=12), 3, 150, seed), RULES, steps
        )
        assert span_ends(driver) == [18, 26]

    without_near_ties(run)


def test_rows_of_other_lengths_without_sinks() -> None:
    """The budget is a fraction of the context: short rows rerank fewer pages. Page 0 is a candidate like any other."""

    def run(seed: int) -> None:
        kv = random_pages(Shape(group=1), 3, 130, seed)
        kv.keys[0][:, :, :4] *= 0.3
        kv.queries[0][:, :, 120:] += 4 * kv.keys[0][:, :, 3:4]  # page 0 is wanted
        valid = torch.arange(130) >= torch.tensor([[0], [60], [0]])
        valid[2, 30:90] = False
        rules = Rules(budget=0.15, num_sink_tokens=0, recent_window=10)
        compare_with_clustered_oracle(expect, Small(2), kv, rules, single_steps(124, 130, valid))

    without_near_ties(run)


def test_paged_softcap_and_sinks() -> None:
    def run(seed: int) -> None:
        kv, sinks = random_pages(Shape(kv_heads=1, key_dim=6), 2, 200, seed), torch.tensor([0.5, 2.0])
        rules, steps = Rules(budget=0.2, recent_window=10, softcap=1.5), single_steps(194, 200)

        def with_cap(cap: int) -> None:
            compare_with_clustered_oracle(expect, Small(), kv, rules, steps, sinks, gpu_memory=cap)

        driver = compare_with_clustered_oracle(
            expect, Small(), kv, rules, steps, sinks, gpu_memory=smallest_gpu_memory(with_cap)
        )
        assert driver.cache.stats().evictions > 0

    without_near_ties(run)


# --------------------------------------------------------------------------------------------- what tokens are parted by


def test_points() -> None:
    """Keys, and log(1 + n * weight) for each query, spread as much: by loops over float64."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn((2, 3, 40, 6), generator=generator) * 2 + 1
    observed = torch.randn((2, 3, 2, 5, 6), generator=generator)
    points = as_points(keys, observed)
    assert points.shape == (2, 3, 40, 11)
    assert torch.equal(points[..., :6], keys)
    for s in range(2):
        for h in range(3):
            k = keys[s, h].double().numpy()
            wanted = np.zeros((40, 5))
            for queries in observed[s, h].double().numpy():
                weights = np.exp(k @ queries.T)
                wanted += weights / weights.sum(0) / 2
            wanted = np.log(1 + 40 * wanted)
            wanted *= math.sqrt(k.var(0).sum() / wanted.var(0).sum())
            assert np.abs(points[s, h, :, 6:].double().numpy() - wanted).max() < 1e-4
    assert as_points(keys, None) is keys


@pytest.mark.parametrize("dim", [112, 128, 160, 256])
def test_points_of_long_keys(dim: int) -> None:
    """As many numbers as kernels take, in which what is far apart stays far apart, also where few channels have all of it."""
    generator = torch.Generator().manual_seed(dim)
    keys = torch.randn((1, 2, 64, dim), generator=generator)
    keys[..., [3, 50]] *= 30
    observed = torch.randn((1, 2, 4, 32, dim), generator=generator) / dim
    alone, both = as_points(keys, None), as_points(keys, observed)
    assert alone.shape[3] == min(dim, POINT_DIM)
    assert both.shape[3] == POINT_DIM
    exact = torch.cdist(keys, keys)
    for points in (alone, both[..., :-32]):
        ratio = torch.cdist(points, points) / exact * math.sqrt(dim / points.shape[3])
        assert float(ratio[exact > 0].quantile(0.05)) > 0.75
        assert float(ratio[exact > 0].quantile(0.95)) < 1.25


def test_what_is_wanted_together_lies_together() -> None:
    """Sixteen of 512 tokens have a little of what the queries ask for, which their keys alone do not show."""
    generator = torch.Generator().manual_seed(1)
    keys, direction = torch.randn((1, 1, 512, 32), generator=generator), torch.zeros(32)
    direction[5] = 1.0
    wanted = torch.randperm(512, generator=generator)[:16]
    keys[..., 5] *= 0.1
    keys[0, 0, wanted] += direction
    observed = 8 * direction.expand(1, 1, 2, 32, 32) + 0.1 * torch.randn((1, 1, 2, 32, 32), generator=generator)

    def pages_with_wanted(observed: torch.Tensor | None) -> int:
        order = Bisection().form_clusters(keys, observed).order[0, 0].view(-1, 4)
        return int(torch.isin(order, wanted).any(1).sum())

    assert pages_with_wanted(observed) <= 4
    assert pages_with_wanted(None) >= 9


# ------------------------------------------------------------------------------------------------ bisection, four bits


def halved(points: np.ndarray, rows: list[int]) -> list[int]:
    """The specification of `bisect` in a dozen lines: the same axis, one half at a time."""
    if len(rows) <= 8:
        return rows
    x = points[rows] - points[rows].mean(0)
    if len(rows) > x.shape[1]:  # from the channel that spreads most, else from the token that lies farthest out
        axis = np.eye(x.shape[1])[np.argmax((x**2).sum(0))]
    else:
        axis = x[np.argmax((x**2).sum(1))]
    for _ in range(9 if len(rows) > x.shape[1] else 8):
        axis = x.T @ (x @ axis)
        axis = axis / np.linalg.norm(axis)
    order = np.argsort(x @ axis, kind="stable")
    middle = 8
    while 2 * middle < len(rows):
        middle *= 2
    return [i for part in (order[:middle], order[middle:]) for i in halved(points, [rows[j] for j in part])]


@pytest.mark.parametrize("count", [8, 16, 24, 56, 72, 400])
@pytest.mark.parametrize("dim", [5, 40])
def test_bisect(count: int, dim: int) -> None:
    """Halves of more tokens than channels, and of fewer."""
    span = torch.logspace(0.5, -0.7, dim)  # axes of different lengths, so that there is a first one
    points = torch.randn((3, count, dim), generator=torch.Generator().manual_seed(count)) * span
    order = bisect(points, 8)
    for h in range(3):
        pages = [sorted(page) for page in order[h].view(-1, 8).tolist()]
        expected = np.array(halved(points[h].double().numpy(), list(range(count)))).reshape(-1, 8)
        assert pages == [sorted(page) for page in expected.tolist()]


def test_bisect_brings_what_lies_together_together() -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(32).repeat_interleave(8)[torch.randperm(256, generator=generator)]
    centres = 10 * torch.randn((32, 6), generator=generator)
    points = centres[label] + 0.01 * torch.randn((1, 256, 6), generator=generator)
    pages = label[bisect(points, 8)[0]].view(-1, 8)
    assert torch.tensor([len(page.unique()) for page in pages]).float().mean() < 2
    same = bisect(torch.zeros((1, 40, 3)), 8)
    assert torch.equal(same.sort(1).values[0], torch.arange(40))


@pytest.mark.parametrize("dim", [1, 5, 12, 64, 96])
def test_rotation_keeps_products(dim: int) -> None:
    a, b = torch.randn((2, 50, dim), generator=torch.Generator().manual_seed(dim))
    torch.testing.assert_close(four_bit_keys.rotate(a) @ four_bit_keys.rotate(b).T, a @ b.T, rtol=0, atol=1e-4)
    if dim == 64:
        assert float(four_bit_keys.rotate(torch.eye(64)).abs().max()) == pytest.approx(1 / 8)  # one number goes to all


@pytest.mark.parametrize("dim", [1, 5, 12, 64])
def test_four_bits(dim: int) -> None:
    vectors = torch.randn((30, dim), generator=torch.Generator().manual_seed(dim)) * torch.logspace(-3, 3, 30)[:, None]
    codes, scale = four_bit_keys.encode(vectors)
    assert (codes.dtype, codes.shape) == (torch.uint8, (30, -(-dim // 2)))
    found = four_bit_keys.decode(codes, dim) * scale.unsqueeze(-1)
    for row in range(30):
        exact = in_four_bits(vectors[row : row + 1].double().numpy())[0]
        np.testing.assert_allclose(found[row].numpy(), exact, rtol=5e-3)  # there the step is rounded
    assert torch.isfinite(four_bit_keys.encode(torch.zeros(2, dim))[1]).all()


def test_codes_are_kept_as_they_are() -> None:
    """Also where vectors become int8: bytes of codes and bfloat16 scales, and the budget knows their size."""
    from tests.support.cache_driver import CacheDriver

    kv = random_pages(Shape(key_dim=6), 1, 100, 0)
    driver = CacheDriver(kv.shape, method=Small(), budget=16, recent_window=10, summary_dtype="int8")
    driver.step(kv, 0, 100)
    store = driver.cache.layers[0].store
    kept = {name: summary.values.dtype for name, summary in store.summaries.items()}
    assert kept == {"mean": torch.int8, "value": torch.int8, "codes": torch.uint8, "scale": torch.bfloat16}
    assert store.budget.summary_bytes == (6 + 4) + (8 + 4) + 4 * 3 + 4 * 2
    assert store.budget.clustering_bytes == 8
    assert store.budget.summary_bytes + store.budget.clustering_bytes == sum(
        array.row_bytes for array in store._arrays()[1:]
    )
    driver.cache.check_integrity()


@pytest.mark.parametrize(("given", "error"), [(0, OptionError), (True, OptionTypeError), (1.5, OptionTypeError)])
def test_parameters(given: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"rerank_factor: expected .*; pass rerank_factor=1 or more"):
        Bisection(given)
