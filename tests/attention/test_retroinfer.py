"""RetroInfer against an oracle with loops over float64: clusters read back from the cache, all else from its documentation.

zones      as for every method, by pages that were not regrouped
clusters   the mean key and the mean value of their tokens; a page that was not regrouped is a cluster by itself
choice     highest sum over the group of softmax over the clusters (scale * q . mean key), page by page up to the budget
estimate   the ceil(share * clusters) next ones, and the cut off end of the last one chosen is the first of them:
               tokens * exp(scale * q . mean key) is their weight, the mean value their value
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
from spin_hf.attention.retroinfer import fill_clusters
from tests.cache.regrouping import little_slack, regrouping_often
from tests.cache.tiny import Driver, Shape, World, poisoned_memory, smallest_gpu_memory

from .conversation import random_world, single_steps, without_near_ties
from .oracle import NearTieError, Rules
from .regrouped import Head, compare, play, softmax_over, stretches, zones_of

MARGIN = 1e-6
RULES = Rules(budget=24, num_sink_tokens=4, recent_window=10)


Small = regrouping_often(RetroInfer, 96, 32)


Whole = regrouping_often(RetroInfer, 8192, 32)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory(), little_slack():
        yield


def expect(rules: Rules, method: RetroInfer, head: Head, query: np.ndarray, at: int, sinks: Any) -> np.ndarray:
    zones = zones_of(rules, head, at)
    clusters, room = zones.clusters, zones.room
    inside = [[token for page in cluster for token in zones.held[page]] for cluster in clusters]
    mean_key, mean_value = ([np.mean(x[tokens], axis=0) for tokens in inside] for x in (head.keys, head.values))
    scores = np.zeros(len(clusters))
    for q in query:
        logits = np.array([rules.scale * float(q @ key) for key in mean_key])
        if len(clusters):
            scores += np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    order = sorted(range(len(clusters)), key=lambda i: -scores[i])
    exact, estimated = [token for page in zones.always for token in zones.held[page]], []
    most, edges = math.ceil(Fraction(repr(method.estimated_share)) * len(clusters)), []
    for rank, i in enumerate(order):
        now, rest = clusters[i][:room], clusters[i][room:]
        exact += [token for page in now for token in zones.held[page]]
        room -= len(now)
        if rest and len(estimated) < most:
            estimated.append((sum(len(zones.held[page]) for page in rest), mean_key[i], mean_value[i]))
            edges += [rank] if len(estimated) in (1, most) else []
        if room == 0 and now:
            edges.append(rank)
    for rank in edges:
        for one, two in ((rank - 1, rank), (rank, rank + 1)):
            if one >= 0 and two < len(order) and scores[order[one]] - scores[order[two]] < MARGIN:
                raise NearTieError("clusters")
    sinks = [None] * len(query) if sinks is None else sinks
    return np.array([softmax_over(rules, head, q, exact, estimated, s) for q, s in zip(query, sinks, strict=True)])


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("share", [0.0, 0.232, 1.0])
def test_choice_and_estimate(group: int, share: float) -> None:
    def run(seed: int) -> None:
        world = random_world(Shape(layers=2, kv_heads=2, group=group, value_dim=6), 2, 190, seed)
        driver = play(expect, Small(estimated_share=share), world, RULES, single_steps(180, 190))
        assert len(stretches(driver)) == 2
        assert driver.cache.stats().attended_tokens < 60

    without_near_ties(run)


def test_incremental_clusters() -> None:
    """From the first token on: clusters are made as tokens leave the recent window, 32 at a time."""

    def run(seed: int) -> None:
        driver = play(expect, Small(), random_world(Shape(kv_heads=1), 1, 150, seed), RULES, single_steps(0, 150))
        assert stretches(driver) == [4, 8, 12, 16]

    without_near_ties(run)


@pytest.mark.parametrize("budget", [8, 30, 64, 0.1, 0.5])
def test_budgets(budget: int | float) -> None:
    """Budgets that cut clusters, and shares of the context."""

    def run(seed: int) -> None:
        rules = Rules(budget=budget, num_sink_tokens=2, recent_window=12)
        play(expect, Small(), random_world(Shape(), 1, 170, seed), rules, single_steps(164, 170))

    without_near_ties(run)


def test_padding_several_queries_and_many() -> None:
    def run(seed: int) -> None:
        valid = torch.ones((3, 170), dtype=torch.bool)
        valid[0, 33:70], valid[1, 20:150:3], valid[2, :21], valid[2, 166] = False, False, False, False
        play(
            expect,
            Small(),
            random_world(Shape(), 3, 170, seed),
            RULES,
            [(stop, valid[:, :stop]) for stop in (130, 131, 135, 160, 170)],
        )

    without_near_ties(run)


def test_a_mask_that_changes_and_crops() -> None:
    """Into a stretch, into the recent window, and on with other tokens."""

    def run(seed: int) -> None:
        world, other = (random_world(Shape(), 2, 180, seed + offset) for offset in (0, 500))
        rules = Rules(**(vars(RULES) | {"scale": Shape().key_dim ** -0.5}))
        driver = Driver(Shape(), method=Small(), budget=24, num_sink_tokens=4, recent_window=10)
        compare(expect, driver, world, rules, 0, 150, None)
        compare(expect, driver, world, rules, 150, 151, None)
        assert stretches(driver)
        valid = torch.ones((2, 180), dtype=torch.bool)
        valid[1, 50:53] = False
        compare(expect, driver, world, rules, 151, 153, valid[:, :153])
        driver.step(other, 153, 160, valid[:, :160])
        driver.cache.crop(-7)
        compare(expect, driver, world, rules, 153, 154, valid[:, :154])
        driver.step(other, 154, 158, valid[:, :158])
        driver.cache.crop(-60)
        compare(expect, driver, other_after(world, other, 98), rules, 98, 99, valid[:, :99])
        for at in range(99, 150):
            compare(expect, driver, other_after(world, other, 98), rules, at, at + 1, valid[:, : at + 1])
        assert stretches(driver)[-1] * 8 > 98

    without_near_ties(run)


def other_after(world: World, other: World, length: int) -> World:
    """`world` up to `length`, then `other`."""

    def join(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.cat([x[:, :, :length], y[:, :, length:]], 2) for x, y in zip(ours, theirs, strict=True)]

    keys, values, queries = (
        join(x, y) for x, y in ((world.keys, other.keys), (world.values, other.values), (world.queries, other.queries))
    )
    return World(world.shape, keys, values, queries)


def test_paged() -> None:
    def run(seed: int) -> None:
        world = random_world(Shape(kv_heads=1), 2, 200, seed)
        steps = single_steps(190, 200)

        def with_cap(cap: int) -> None:
            play(expect, Small(), world, RULES, steps, gpu_memory=cap)

        driver = play(expect, Small(), world, RULES, steps, gpu_memory=smallest_gpu_memory(with_cap))
        assert driver.cache.stats().evictions > 0

    without_near_ties(run)


def test_softcap_and_attention_sinks() -> None:
    def run(seed: int) -> None:
        sinks = torch.tensor([0.5, -1.0, 3.0, 1.0])
        rules = Rules(budget=24, recent_window=10, softcap=1.5)
        play(expect, Small(), random_world(Shape(), 2, 160, seed), rules, single_steps(154, 160), sinks=sinks)

    without_near_ties(run)


def test_int8_summaries_estimate_nearly_the_same() -> None:
    world = random_world(Shape(), 1, 200, 0)
    outputs = []
    for dtype in ("model", "int8"):
        driver = Driver(
            world.shape, method=Small(estimated_share=1.0), budget=80, recent_window=10, summary_dtype=dtype
        )
        driver.step(world, 0, 199)
        outputs.append(driver.step(world, 199, 200)[0])
        driver.cache.check_integrity()
    assert 0 < float((outputs[0] - outputs[1]).abs().max()) < 0.05


def test_the_estimate_brings_the_output_nearer() -> None:
    """Keys and values in topics, somewhat as a model's are: at the same budget the error falls by a third, and more."""
    shape = Shape(kv_heads=2, group=2)
    generator = torch.Generator().manual_seed(0)
    world = World.random(shape, 1, 401, 0, peak=1.0)
    topics = torch.randint(0, 20, (401,), generator=generator)
    for states in (world.keys[0], world.values[0]):
        states.mul_(0.3).add_(torch.randn((1, 2, 20, 8), generator=generator)[:, :, topics])
    errors = []
    for share in (0.0, 0.232, 1.0):
        outputs = []
        for budget in (32, 1000):
            driver = Driver(shape, method=Whole(estimated_share=share), budget=budget, recent_window=10)
            with torch.no_grad():
                driver.step(world, 0, 400)
                outputs.append(driver.step(world, 400, 401)[0])
        errors.append(float((outputs[0] - outputs[1]).norm() / outputs[1].norm()))
    assert errors[0] > 1.5 * errors[1] > 0
    assert errors[1] > 1.5 * errors[2] > 0


# ------------------------------------------------------------------------------------------------------------- clusters


def unit(points: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(points, dim=-1)


@pytest.mark.parametrize("count", [8, 16, 24, 160, 1000])
def test_clusters_are_whole_pages(count: int) -> None:
    points = unit(torch.randn((3, count, 6), generator=torch.Generator().manual_seed(count)))
    cluster, rank = fill_clusters(points, 16, 8)
    for h in range(3):
        for number in cluster[h].unique():
            ranks = rank[h][cluster[h] == number]
            assert len(ranks) % 8 == 0
            assert sorted(ranks.tolist()) == list(range(len(ranks)))
        assert count < 160 or 10 <= count / len(cluster[h].unique()) <= 20


def test_planted_clusters_are_found() -> None:
    """Twelve directions of 32 or 40 points each: hardly a page mixes two of them, where consecutive points mix seven."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn((12, 12), generator=generator)).Q
    label = torch.cat([torch.full((32 if i % 2 else 40,), i) for i in range(12)])
    label = label[torch.randperm(len(label), generator=generator)]
    noise = 0.02 * torch.randn((1, len(label), 12), generator=generator)
    cluster, rank = fill_clusters(unit(directions[label] + noise), 16, 8)
    pages = label[(cluster[0] * 1000 + rank[0]).argsort()].view(-1, 8)
    kinds = torch.tensor([len(page.unique()) for page in pages])
    assert (kinds == 1).float().mean() > 0.9
    assert torch.tensor([len(page.unique()) for page in label.view(-1, 8)]).float().mean() > 5


def test_points_left_over_are_clustered_among_themselves() -> None:
    """Two directions of 11 and 13 points, and one cluster each: 8 of each stay, the 8 others make a page."""
    generator = torch.Generator().manual_seed(2)
    label = torch.tensor([0] * 11 + [1] * 13)
    points = unit(torch.eye(2)[label] + 0.1 * torch.randn((1, 24, 2), generator=generator))
    cluster, rank = fill_clusters(points, 12, 8)
    (kept, others) = (
        [n for n in cluster[0].unique().tolist() if len(label[cluster[0] == n].unique()) == k] for k in (1, 2)
    )
    assert (len(kept), len(others)) == (2, 1)
    for number in kept:
        inside = cluster[0] == number
        centre = unit(points[0][label == label[inside][0]].sum(0))
        likeness = points[0] @ centre
        outside = (label == label[inside][0]) & ~inside
        assert likeness[inside].min() > likeness[outside].max()
        assert (likeness[inside][rank[0][inside].argsort()].diff() <= 0).all()


def test_equal_points_are_one_cluster() -> None:
    cluster, rank = fill_clusters(torch.zeros((1, 64, 4)), 16, 8)
    assert len(cluster.unique()) == 1
    assert sorted(rank[0].tolist()) == list(range(64))


def test_hopeless_points_end_up_on_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last round pages are filled as tokens come."""
    monkeypatch.setattr("spin_hf.attention.retroinfer._MOST_ROUNDS", 0)
    points = unit(torch.randn((2, 80, 3), generator=torch.Generator().manual_seed(3)))
    cluster, rank = fill_clusters(points, 16, 8)
    for h in range(2):
        assert torch.equal(cluster[h].bincount(), torch.full((10,), 8))
        assert torch.equal((cluster[h] * 8 + rank[h]).sort().values, torch.arange(80))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (dict(estimated_share=1.5), OptionError), (dict(estimated_share=-0.1), OptionError),
        (dict(estimated_share="all"), OptionTypeError), (dict(estimated_share=True), OptionTypeError),
        (dict(cluster_tokens=4), OptionError), (dict(cluster_tokens=16.0), OptionTypeError),
        (dict(cluster_tokens=True), OptionTypeError),
    ],
)  # fmt: skip
def test_parameters(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"{next(iter(options))}: expected .*; pass"):
        RetroInfer(**options)
