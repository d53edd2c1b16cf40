"""RetroInfer against an oracle in float64. Clusters are read back from the cache, all else is from its documentation.

zones      as for every method, by pages that are not clustered
rows       a page's key and value are the means over the tokens of its cluster; a page not clustered is a cluster by itself
score      of a page: log of the sum over the group of softmax over all candidate pages (scale * q . mean key)
selection  the highest scores up to the budget; equal scores by page number
estimate   depth of a page: log of the group's size, minus its score, in steps of 1/64. The budget and ceil(fraction * pages)
           more pages make the zone, by depth; all pages as deep as its last one belong to it. Those not selected are estimated:
               tokens of the page * exp(scale * q . mean key) is their weight, the mean value their value
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from spin_hf import OptionError, OptionTypeError, RetroInfer
from spin_hf.kernels import fill_clusters, score_bins
from spin_hf.kernels.reference_clustering import LIKENESS_STEPS
from spin_hf.storage.token_permutation import tiles
from tests.support.cache_driver import CacheDriver, RandomKV, Shape, poisoned_memory, smallest_gpu_memory
from tests.support.clustered_oracle import (
    Head,
    compare_step,
    compare_with_clustered_oracle,
    softmax_over,
    zones_of,
)
from tests.support.clustered_pages import span_ends
from tests.support.clustering_methods import clustering_often, little_slack
from tests.support.conversation import random_pages, single_steps, without_near_ties
from tests.support.oracle import NearTieError, Rules

MARGIN = 1e-5
RULES = Rules(budget=24, num_sink_tokens=4, recent_window=10)


Small = clustering_often(RetroInfer, 96, 32)


Whole = clustering_often(RetroInfer, 8192, 32)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory(), little_slack():
        yield


def expect(rules: Rules, method: RetroInfer, head: Head, query: np.ndarray, at: int, sinks: Any) -> np.ndarray:
    zones = zones_of(rules, head, at)
    exact, estimated = [token for page in zones.always for token in zones.held[page]], []
    row = {}
    for cluster in zones.clusters:
        tokens = [token for page in cluster for token in zones.held[page]]
        row |= dict.fromkeys(cluster, (np.mean(head.keys[tokens], axis=0), np.mean(head.values[tokens], axis=0)))
    if row:
        score = scores({page: key for page, (key, _) in row.items()}, rules.scale, query)
        order = sorted(row, key=lambda page: (-score[page], page))
        chosen = order[: zones.room]
        if 0 < len(chosen) < len(order) and 0 < score[chosen[-1]] - score[order[len(chosen)]] < MARGIN:
            raise NearTieError("pages")
        exact += [token for page in chosen for token in zones.held[page]]
        zone = zone_of(
            {page: math.log(len(query)) - score[page] for page in row}, zones.room, method.estimated_fraction
        )
        estimated = [(len(zones.held[page]), *row[page]) for page in zone if page not in chosen]
    sinks = [None] * len(query) if sinks is None else sinks
    return np.array([softmax_over(rules, head, q, exact, estimated, s) for q, s in zip(query, sinks, strict=True)])


def scores(keys: dict[int, np.ndarray], scale: float, query: np.ndarray) -> dict[int, float]:
    """Of pages, by their mean keys."""
    logits = scale * query @ np.array(list(keys.values())).T
    weights = np.exp(logits)
    return dict(zip(keys, np.log((weights / weights.sum(1, keepdims=True)).sum(0)).tolist(), strict=True))


def zone_of(depth: dict[int, float], room: int, share: float) -> list[int]:
    """The pages that are chosen or estimated, of which `room` are chosen."""
    if not share:
        return []
    steps = {page: min(int(64 * max(0.0, nats)), 2046) for page, nats in depth.items()}
    most = min(len(depth), room + math.ceil(Fraction(repr(share)) * len(depth)))
    last = sorted(steps.values())[most - 1]
    for edge in (last, last + 1):
        if 0 < edge < 2046 and any(abs(64 * nats - edge) < 64 * MARGIN for nats in depth.values()):
            raise NearTieError("edge of the zone")
    return [page for page, step in steps.items() if step <= last]


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("share", [0.0, 0.232, 1.0])
def test_choice_and_estimate(group: int, share: float) -> None:
    def run(seed: int) -> None:
        kv = random_pages(Shape(layers=2, kv_heads=2, group=group, value_dim=6), 2, 190, seed)
        driver = compare_with_clustered_oracle(
            expect, Small(estimated_fraction=share), kv, RULES, single_steps(180, 190)
        )
        assert len(span_ends(driver)) == 2
        assert driver.cache.stats().attended_tokens < 60

    without_near_ties(run)


def test_incremental_clusters() -> None:
    """From the first token on: clusters are made as tokens leave the recent window, 32 at a time."""

    def run(seed: int) -> None:
        driver = compare_with_clustered_oracle(
            expect, Small(), random_pages(Shape(kv_heads=1), 1, 150, seed), RULES, single_steps(0, 150)
        )
        assert span_ends(driver) == [4, 8, 12, 16]

    without_near_ties(run)


@pytest.mark.parametrize("budget", [8, 30, 64, 0.1, 0.5])
def test_budgets(budget: int | float) -> None:
    """Budgets that cut clusters, and fractions of the context."""

    def run(seed: int) -> None:
        rules = Rules(budget=budget, num_sink_tokens=2, recent_window=12)
        compare_with_clustered_oracle(
            expect, Small(), random_pages(Shape(), 1, 170, seed), rules, single_steps(164, 170)
        )

    without_near_ties(run)


def test_padding_several_queries_and_many() -> None:
    def run(seed: int) -> None:
        valid = torch.ones((3, 170), dtype=torch.bool)
        valid[0, 33:70], valid[1, 20:150:3], valid[2, :21], valid[2, 166] = False, False, False, False
        compare_with_clustered_oracle(
            expect,
            Small(),
            random_pages(Shape(), 3, 170, seed),
            RULES,
            [(stop, valid[:, :stop]) for stop in (130, 131, 135, 160, 170)],
        )

    without_near_ties(run)


def test_a_mask_that_changes_and_crops() -> None:
    """Crops into a span and into the recent window, then other tokens."""

    def run(seed: int) -> None:
        kv, other = (random_pages(Shape(), 2, 180, seed + offset) for offset in (0, 500))
        rules = Rules(**(vars(RULES) | {"scale": Shape().key_dim ** -0.5}))
        driver = CacheDriver(Shape(), method=Small(), budget=24, num_sink_tokens=4, recent_window=10)
        compare_step(expect, driver, kv, rules, 0, 150, None)
        compare_step(expect, driver, kv, rules, 150, 151, None)
        assert span_ends(driver)
        valid = torch.ones((2, 180), dtype=torch.bool)
        valid[1, 50:53] = False
        compare_step(expect, driver, kv, rules, 151, 153, valid[:, :153])
        driver.step(other, 153, 160, valid[:, :160])
        driver.cache.crop(-7)
        compare_step(expect, driver, kv, rules, 153, 154, valid[:, :154])
        driver.step(other, 154, 158, valid[:, :158])
        driver.cache.crop(-60)
        compare_step(expect, driver, other_after(kv, other, 98), rules, 98, 99, valid[:, :99])
        for at in range(99, 150):
            compare_step(expect, driver, other_after(kv, other, 98), rules, at, at + 1, valid[:, : at + 1])
        assert span_ends(driver)[-1] * 8 > 98

    without_near_ties(run)


def other_after(kv: RandomKV, other: RandomKV, length: int) -> RandomKV:
    """`kv` up to `length`, then `other`."""

    def join(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.cat([x[:, :, :length], y[:, :, length:]], 2) for x, y in zip(ours, theirs, strict=True)]

    keys, values, queries = (
        join(x, y) for x, y in ((kv.keys, other.keys), (kv.values, other.values), (kv.queries, other.queries))
    )
    return RandomKV(kv.shape, keys, values, queries)


def test_score_bins() -> None:
    nats = torch.tensor([float("inf"), 3.0, 0.0, -1 / 128, -1 / 64, -1.0, -31.96, -31.97, -1e6, float("-inf")])
    assert score_bins(nats).tolist() == [0, 1, 1, 1, 2, 65, 2046, 2047, 2047, 2047]


def test_paged() -> None:
    def run(seed: int) -> None:
        kv = random_pages(Shape(kv_heads=1), 2, 200, seed)
        steps = single_steps(190, 200)

        def with_cap(cap: int) -> None:
            compare_with_clustered_oracle(expect, Small(), kv, RULES, steps, gpu_memory=cap)

        driver = compare_with_clustered_oracle(
            expect, Small(), kv, RULES, steps, gpu_memory=smallest_gpu_memory(with_cap)
        )
        assert driver.cache.stats().evictions > 0

    without_near_ties(run)


def test_softcap_and_attention_sinks() -> None:
    def run(seed: int) -> None:
        sinks = torch.tensor([0.5, -1.0, 3.0, 1.0])
        rules = Rules(budget=24, recent_window=10, softcap=1.5)
        compare_with_clustered_oracle(
            expect, Small(), random_pages(Shape(), 2, 160, seed), rules, single_steps(154, 160), sinks=sinks
        )

    without_near_ties(run)


def test_int8_summaries_estimate_nearly_the_same() -> None:
    kv = random_pages(Shape(), 1, 200, 0)
    outputs = []
    for dtype in ("model", "int8"):
        driver = CacheDriver(
            kv.shape, method=Small(estimated_fraction=1.0), budget=80, recent_window=10, summary_dtype=dtype
        )
        driver.step(kv, 0, 199)
        outputs.append(driver.step(kv, 199, 200)[0])
        driver.cache.check_integrity()
    assert 0 < float((outputs[0] - outputs[1]).abs().max()) < 0.05


def test_the_estimate_brings_the_output_nearer() -> None:
    """Keys and values in topics, somewhat as a model's are: at the same budget the error falls by a third, and more."""
    shape = Shape(kv_heads=2, group=2)
    generator = torch.Generator().manual_seed(0)
    kv = RandomKV.random(shape, 1, 401, 0, peak=1.0)
    topics = torch.randint(0, 20, (401,), generator=generator)
    for states in (kv.keys[0], kv.values[0]):
        states.mul_(0.3).add_(torch.randn((1, 2, 20, 8), generator=generator)[:, :, topics])
    errors = []
    for share in (0.0, 0.232, 1.0):
        outputs = []
        for budget in (32, 1000):
            driver = CacheDriver(shape, method=Whole(estimated_fraction=share), budget=budget, recent_window=10)
            with torch.no_grad():
                driver.step(kv, 0, 400)
                outputs.append(driver.step(kv, 400, 401)[0])
        errors.append(float((outputs[0] - outputs[1]).norm() / outputs[1].norm()))
    assert errors[0] > 1.5 * errors[1] > 0
    assert errors[1] > 1.5 * errors[2] > 0


# ------------------------------------------------------------------------------------------------------------- clusters


def unit(points: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(points, dim=-1)


def ordered(points: torch.Tensor, cluster_tokens: int = 16) -> tuple[torch.Tensor, list[list[list[int]]]]:
    """Order [R, n], and the points of each cluster of each row."""
    order, pages = fill_clusters(points, cluster_tokens, 8)
    assert torch.equal(order.sort(1).values, torch.arange(points.shape[1]).expand_as(order))
    assert tiles(pages.unsqueeze(0))
    sizes = [[8 * size for size in row if size] for row in pages.tolist()]
    return order, [[part.tolist() for part in row.split(size)] for row, size in zip(order, sizes, strict=True)]


@pytest.mark.parametrize("count", [8, 16, 24, 160, 1000])
@pytest.mark.parametrize("cluster_tokens", [8, 16, 40])
def test_clusters_are_whole_pages(count: int, cluster_tokens: int) -> None:
    points = unit(torch.randn((3, count, 6), generator=torch.Generator().manual_seed(count)))
    for clusters in ordered(points, cluster_tokens)[1]:
        assert count < 160 or cluster_tokens != 16 or 10 <= count / len(clusters) <= 20


def test_rows_do_not_disturb_each_other() -> None:
    """Spans that are clustered together give what they give alone."""
    points = unit(torch.randn((5, 400, 6), generator=torch.Generator().manual_seed(4)).double())
    together = fill_clusters(points, 16, 8)
    for row in range(5):
        alone = fill_clusters(points[row : row + 1], 16, 8)
        for one, all_rows in zip(alone, together, strict=True):
            assert torch.equal(one[0], all_rows[row])


def test_products_in_float16_make_clusters_as_good() -> None:
    """As on a GPU: the mean of a page is nearly as long."""
    directions = torch.randn((40, 16), generator=torch.Generator().manual_seed(5))
    label = torch.randint(0, 40, (2, 800), generator=torch.Generator().manual_seed(6))
    points = unit(directions[label] + torch.randn((2, 800, 16), generator=torch.Generator().manual_seed(7)))
    lengths = []
    for compared in (torch.float32, torch.float16):
        order, _ = fill_clusters(points.to(compared), 16, 8)
        pages = points.gather(1, order.unsqueeze(-1).expand_as(points)).unflatten(1, (-1, 8))
        lengths.append(float(pages.mean(2).norm(dim=-1).mean()))
    consecutive = float(points.unflatten(1, (-1, 8)).mean(2).norm(dim=-1).mean())
    assert abs(lengths[0] - lengths[1]) < 0.03 * (lengths[0] - consecutive)


def test_planted_clusters_are_found() -> None:
    """Twelve directions of 32 or 40 points each: hardly a page mixes two of them, where consecutive points mix seven."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn((12, 12), generator=generator)).Q
    label = torch.cat([torch.full((32 if i % 2 else 40,), i) for i in range(12)])
    label = label[torch.randperm(len(label), generator=generator)]
    noise = 0.02 * torch.randn((1, len(label), 12), generator=generator)
    pages = label[ordered(unit(directions[label] + noise))[0][0]].view(-1, 8)
    kinds = torch.tensor([len(page.unique()) for page in pages])
    assert (kinds == 1).float().mean() > 0.9
    assert torch.tensor([len(page.unique()) for page in label.view(-1, 8)]).float().mean() > 5


def test_points_left_over_are_clustered_among_themselves() -> None:
    """Two directions of 11 and 13 points, and one cluster each: 8 of each stay, the 8 others make a page."""
    generator = torch.Generator().manual_seed(2)
    label = torch.tensor([0] * 11 + [1] * 13)
    points = unit(torch.eye(2)[label] + 0.1 * torch.randn((1, 24, 2), generator=generator))
    clusters = ordered(points, 12)[1][0]
    assert [len(label[cluster].unique()) for cluster in clusters] == [1, 1, 2]
    for cluster in clusters[:2]:
        same = label == label[cluster[0]]
        likeness = points[0] @ unit(points[0][same].sum(0))
        outside = same.clone()
        outside[cluster] = False
        assert likeness[cluster].min() > likeness[outside].max()
        assert (likeness[cluster].diff() <= 2 / LIKENESS_STEPS).all()  # equal steps lie as they come


def test_equal_points_are_one_cluster() -> None:
    assert ordered(torch.zeros((1, 64, 4)))[1][0] == [list(range(64))]


def test_points_that_are_no_numbers_keep_their_pages() -> None:
    """As those of a head with an infinite key."""
    ordered(torch.full((1, 160, 4), float("nan")))


def test_hopeless_points_end_up_on_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last round pages are filled as tokens come."""
    monkeypatch.setattr("spin_hf.kernels.reference_clustering.ROUNDS", ())
    points = unit(torch.randn((2, 80, 3), generator=torch.Generator().manual_seed(3)))
    assert ordered(points)[1] == [[list(range(i, i + 8)) for i in range(0, 80, 8)]] * 2


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (dict(estimated_fraction=1.5), OptionError), (dict(estimated_fraction=-0.1), OptionError),
        (dict(estimated_fraction="all"), OptionTypeError), (dict(estimated_fraction=True), OptionTypeError),
        (dict(cluster_tokens=4), OptionError), (dict(cluster_tokens=16.0), OptionTypeError),
        (dict(cluster_tokens=True), OptionTypeError),
    ],
)  # fmt: skip
def test_parameters(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"{next(iter(options))}: expected .*; pass"):
        RetroInfer(**options)
