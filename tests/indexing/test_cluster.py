"""When pages are regrouped and when they go back, what sequences share of them, and what happens if that fails.

What regrouped pages give is in `tests/contract/test_regrouping.py`, random histories in `test_state_machine.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from spin_hf import CacheStateError, RetroInfer, ShadowKV
from spin_hf.attention.methods.clustering import Arrangement
from spin_hf.indexing import cluster, summarize
from spin_hf.storage.token_permutation import RegroupedPages
from tests.support.cache_driver import CacheDriver, RandomKV, Shape, poisoned_memory
from tests.support.clustering_methods import Backwards, Clumped, Shuffled, clustering_often, little_slack

SHAPE = Shape(layers=3, kv_heads=2, group=2, value_dim=6)
OPTIONS: dict[str, Any] = dict(budget=1000, num_sink_tokens=4, recent_window=9)
LENGTH = 400


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory(), little_slack():
        yield


@pytest.fixture(scope="module")
def world() -> RandomKV:
    return RandomKV.random(SHAPE, 3, LENGTH, seed=0)


def new_driver(**options: Any) -> CacheDriver:
    return CacheDriver(SHAPE, **({"method": Clumped()} | OPTIONS | options))


def stops(driver: CacheDriver) -> list[int]:
    """Where the stretches end, in pages."""
    return driver.cache._shared.sequences.stretches.stops


def regrouped(driver: CacheDriver, layer: int = 0) -> RegroupedPages:
    found = driver.cache.layers[layer].store.regrouped
    assert found is not None
    return found


def moved(driver: CacheDriver, layer: int = 0) -> Tensor:
    """Pages [B, N] that are no runs, in any head."""
    pages = driver.cache._shared.sequences.num_pages
    positions = regrouped(driver, layer).positions(0, pages)
    return (positions != torch.arange(pages * 8).view(pages, 8)).any(3).any(1)


def test_stretches_of_a_growing_context(world: RandomKV) -> None:
    """At 200 tokens 17 are recent: 21 pages behind the sinks in equal parts of 64 tokens or less. Then three at a time."""
    driver = new_driver(method=Backwards())
    driver.step(world, 0, 200)
    assert stops(driver) == []
    driver.step(world, 200, 201)
    assert stops(driver) == [8, 15, 22]
    positions = regrouped(driver).positions(0, 26)
    assert positions[0, 0, 1].tolist() == list(range(63, 55, -1))  # page 0 has the sinks
    assert torch.equal(positions[:, :, 22:], torch.arange(176, 208).view(4, 8).expand(3, 2, -1, -1))
    for position in range(201, 250):
        driver.step(world, position, position + 1)
        driver.cache.check_integrity()
    assert stops(driver) == [8, 15, 22, 25, 28]


def test_stretches_of_the_default_sizes() -> None:
    """A prompt of 4,000 tokens is one stretch; what stays is the recent window, 64 tokens, and less than 1,024 tokens."""

    @dataclass(frozen=True)
    class Ordinary(Backwards):
        stretch_tokens, growth_tokens = 8192, 1024

    shape = Shape(layers=1, kv_heads=1, group=1)
    world = RandomKV.random(shape, 1, 4800, seed=1)
    driver = CacheDriver(shape, method=Ordinary(), budget=64)
    with patch.object(cluster, "SLACK_TOKENS", 64):
        driver.step(world, 0, 4000)
        driver.step(world, 4000, 4001)
        assert stops(driver) == [(4000 - 128) // 8]
        driver.step(world, 4001, 4800)
        assert len(stops(driver)) == 1


@pytest.mark.parametrize(
    ("removed", "left"),
    [(1, [8, 15, 22]), (16, [8, 15, 22]), (17, [8, 15]), (72, [8, 15]), (73, [8]), (190, []), (201, [])],
)
def test_crops(world: RandomKV, removed: int, left: list[int]) -> None:
    """The slack of 8 tokens spares a stretch; what reaches into its pages, or moves the window there, does not."""
    driver = new_driver()
    driver.step(world, 0, 200)
    driver.step(world, 200, 201)
    assert stops(driver) == [8, 15, 22]
    driver.cache.crop(-removed)
    driver.cache.check_integrity()
    assert stops(driver) == left
    kept = 201 - removed
    if kept:
        assert torch.equal(driver.cache.layers[2].keys, world.keys[2][:, :, :kept])
    for stop in range(kept + 1, kept + 4):
        driver.step(world, stop - 1, stop)
        driver.cache.check_integrity()


def test_what_stays_in_its_place(world: RandomKV) -> None:
    """Sinks behind left padding, padded pages, and the recent window of a row that ended early."""
    valid = torch.ones((3, LENGTH), dtype=torch.bool)
    valid[0, :21], valid[1, 83:92], valid[2, 120:220] = False, False, False
    driver = new_driver(num_sink_tokens=5)
    driver.step(world, 0, 220, valid[:, :220])
    driver.step(world, 220, 221, valid[:, :221])
    pages = driver.cache._shared.sequences.stretches.num_pages
    assert pages == (220 - 17) // 8
    stays = ~moved(driver)
    assert stays[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 25, 26, 27]  # tokens 21 to 25 are the sinks
    assert stays[1].nonzero().flatten().tolist() == [0, 9, 10, 11, 25, 26, 27]  # page 9 is left alone in its stretch
    # Tokens 103 to 119 are the last 17 of row 2, and pages 15 to 27 are padding
    assert stays[2].nonzero().flatten().tolist() == [0, *range(12, 28)]
    driver.cache.check_integrity()


def test_how_many_tokens_at_once_does_not_matter(world: RandomKV, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of several lengths, of several rows and stretches, are arranged together or one by one."""
    valid = torch.ones((3, LENGTH), dtype=torch.bool)
    valid[0, :21], valid[1, 83:92], valid[2, 120:220] = False, False, False
    found = []
    for tokens in (1 << 15, 300, 8):
        monkeypatch.setattr(cluster, "_TOKENS_AT_ONCE", tokens)
        driver = new_driver(method=Backwards())
        driver.step(world, 0, 390, valid[:, :390])
        with patch.object(Backwards, "arrange", autospec=True, side_effect=Backwards.arrange) as arrange:
            driver.step(world, 390, 391, valid[:, :391])
        driver.cache.check_integrity()
        shapes = [call.args[1].shape for call in arrange.call_args_list]
        runs = [shape[0] // SHAPE.layers for shape in shapes]  # each of all layers
        assert all(many == 1 or many * shape[2] <= tokens for many, shape in zip(runs, shapes, strict=True))
        found.append((len(shapes), stops(driver), regrouped(driver, 2).positions(0, 46).tolist()))
    assert found[0][0] < found[1][0] < found[2][0]
    assert found[0][1:] == found[1][1:] == found[2][1:]


def test_padding_that_changes(world: RandomKV) -> None:
    """A token in page 9 turns into padding: the stretch [8, 15) and the one behind it go back, and are made anew."""
    driver = new_driver()
    driver.step(world, 0, 200)
    driver.step(world, 200, 201)
    valid = torch.ones((3, 202), dtype=torch.bool)
    valid[1, 75] = False
    driver.step(world, 201, 202, valid)
    assert stops(driver) == [8, 15, 22]
    assert not moved(driver)[1, 9]
    driver.cache.check_integrity()
    assert torch.equal(driver.cache.layers[1].values, world.values[1][:, :, :202])


def test_a_token_that_turns_real_beside_partitions_of_other_sequences(world: RandomKV) -> None:
    """Page 9 of row 0 waits for its padding; in others clusters of several pages lie there, and keep their means."""
    driver = new_driver(method=clustering_often(RetroInfer, 64, 24)(cluster_tokens=32))
    valid = torch.ones((3, 202), dtype=torch.bool)
    valid[0, 75] = False
    driver.step(world, 0, 200, valid[:, :200])
    driver.step(world, 200, 201, valid[:, :201])
    assert not moved(driver)[0, 9]
    assert (regrouped(driver).partition_pages(9, 10)[1:] == 0).any()  # it belongs to one that begins before
    before = stops(driver)
    driver.step(world, 201, 202)
    assert stops(driver) == before
    driver.cache.check_integrity()


def test_sinks_that_move(world: RandomKV) -> None:
    """The first tokens turn into padding, so that later ones become sinks: they must not lie in regrouped pages."""
    driver = new_driver(num_sink_tokens=16)
    driver.step(world, 0, 200)
    driver.step(world, 200, 201)
    assert moved(driver)[0, 2]
    valid = torch.ones((3, 202), dtype=torch.bool)
    valid[0, :8] = False
    driver.step(world, 201, 202, valid)
    assert not moved(driver)[0, :3].any()
    driver.cache.check_integrity()


def test_what_sequences_share_is_arranged_once(world: RandomKV) -> None:
    """Three beams of one prompt: regrouping copies nothing that they share whole."""
    driver = new_driver()
    sequences = driver.cache._shared.sequences
    one = world.rows([0])
    driver.step(one, 0, 300)
    driver.cache.reorder_cache(torch.tensor([0]))
    driver.cache.batch_repeat_interleave(3)
    assert sequences.segments_in_use == 2
    with patch.object(Clumped, "arrange", autospec=True, side_effect=Clumped.arrange) as arrange:
        driver.step(world.rows([0, 0, 0]), 300, 301)
    assert [call.args[1].shape[0] for call in arrange.call_args_list] == [SHAPE.layers * len(stops(driver))]
    assert sequences.segments_in_use == 4  # the new token's segment is each beam's own
    driver.cache.check_integrity()


def test_beams_that_differ_do_not_disturb_each_other(world: RandomKV) -> None:
    """A stretch over a segment that they share and one that they do not: both go their own ways."""
    driver = new_driver(method=Shuffled(), dense_below=1000)
    with patch.object(cluster, "grow", lambda shared: None):  # until they differ
        driver.step(world.rows([0]), 0, 270)
        driver.cache.batch_repeat_interleave(2)
        both = RandomKV(SHAPE, *([x.clone() for x in xs[:3]] for xs in (world.keys, world.values, world.queries)))
        for states in (both.keys, both.values):
            for layer in range(SHAPE.layers):
                states[layer][1, :, :270] = states[layer][0, :, :270]
        both = both.rows([0, 1])
        driver.step(both, 270, 380)
        driver.cache.check_integrity()
    assert driver.cache._shared.sequences.segments_in_use == 3
    with patch.object(Backwards, "stretch_tokens", 400):
        driver.step(both, 380, 381)
    assert stops(driver) == [(380 - 17) // 8]
    assert driver.cache._shared.sequences.segments_in_use == 4
    driver.cache.check_integrity()
    for layer in range(SHAPE.layers):
        assert torch.equal(driver.cache.layers[layer].keys, both.keys[layer][:, :, :381])


def test_no_room_for_copies(world: RandomKV, caplog: pytest.LogCaptureFixture) -> None:
    """A stretch that beams share in part stays as it is where they may not be given copies, and one warning says so."""
    driver = new_driver()
    with patch.object(cluster, "grow", lambda shared: None):
        driver.step(world.rows([0]), 0, 270)
        driver.cache.batch_repeat_interleave(2)
        driver.step(world.rows([0, 0]), 270, 380)
    used = driver.cache._shared.sequences.segments_in_use
    for layer in driver.cache.layers:
        object.__setattr__(layer.store.budget, "gpu_memory", 1)
    with patch.object(Clumped, "stretch_tokens", 400), caplog.at_level(logging.WARNING, "spin_hf"):
        cluster.grow(driver.cache._shared)
    assert "no room" in caplog.text
    assert stops(driver) == [(380 - 17) // 8]
    assert not moved(driver).any()
    assert driver.cache._shared.sequences.segments_in_use == used
    driver.cache.check_integrity()


class InjectedError(Exception):
    """What the tests raise."""


@pytest.mark.parametrize("error", [InjectedError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["arrange", "index_pages"])
@pytest.mark.parametrize(("tokens_at_once", "call"), [(1 << 15, 1), (1 << 15, 2), (72, 1), (72, 4), (72, 8)])
def test_interrupted(
    world: RandomKV,
    where: str,
    tokens_at_once: int,
    call: int,
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the first layer, in the second, in another stretch: every layer is what it was or regrouped, and all is right.

    The next step goes on with the layers that are missing.
    """
    monkeypatch.setattr(cluster, "_TOKENS_AT_ONCE", tokens_at_once)
    monkeypatch.setattr(summarize, "_BYTES_AT_ONCE", 1)  # layer by layer
    driver = new_driver(method=Shuffled())
    driver.step(world, 0, 200)
    before = getattr(Shuffled, where)
    calls = 0

    def failing(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return before(self, *args)

    with patch.object(Shuffled, where, failing), pytest.raises(error):
        driver.step(world, 200, 201)
    driver.cache.check_integrity()
    if where == "index_pages":
        before_it, layer = divmod(call - 1, SHAPE.layers)
        first, stop = [0, 8, 15, 22][before_it], stops(driver)[-1]
        assert moved(driver, layer)[:, max(1, first) : stop].all()  # its summaries were made since
        assert not any(moved(driver, behind)[:, first:stop].any() for behind in range(layer + 1, SHAPE.layers))
        assert moved(driver, 0)[:, 1:first].all()
    assert driver.cache.get_seq_length() == 200
    for layer in range(SHAPE.layers):
        assert torch.equal(driver.cache.layers[layer].keys, world.keys[layer][:, :, :200])
    twin = new_driver(method=ShadowKV())
    twin.step(world, 0, 200)
    outputs = [d.step(world, 200, 201) for d in (driver, twin)]
    for ours, theirs in zip(*outputs, strict=True):
        assert float((ours - theirs).abs().max()) < 1e-5
    driver.cache.check_integrity()
    undisturbed = new_driver(method=Shuffled())
    undisturbed.step(world, 0, 200)
    undisturbed.step(world, 200, 201)
    assert stops(driver) == stops(undisturbed)
    assert all(torch.equal(moved(driver, layer), moved(undisturbed, layer)) for layer in range(SHAPE.layers))


@pytest.mark.parametrize("wrong", ["twice", "short", "gap", "overlap", "beyond", "few", "several"])
def test_a_method_that_loses_tokens(world: RandomKV, wrong: str) -> None:
    @dataclass(frozen=True)
    class Losing(Backwards):
        def arrange(self, keys: Tensor, asked: Tensor | None) -> Arrangement:
            places = torch.arange(keys.shape[2]).expand(keys.shape[:3])
            if wrong in ("twice", "short"):
                return Arrangement(places // 2 if wrong == "twice" else places[:, :, 1:])
            pages = torch.ones((*keys.shape[:2], keys.shape[2] // 8), dtype=torch.int64)
            if wrong == "several":
                return Arrangement(places, pages)
            if wrong == "few":
                return Arrangement(places, pages[:, :, 1:])
            at, number = {"gap": (2, 0), "overlap": (2, 2), "beyond": (-1, 2)}[wrong]
            pages[:, 1, at] = number
            return Arrangement(places, pages)

    Losing.several_pages = wrong != "several"
    driver = new_driver(method=Losing())
    driver.step(world, 0, 200)
    with pytest.raises(CacheStateError, match=r"expected .*arrange.*correct the method"):
        driver.step(world, 200, 201)
    driver.cache.check_integrity()


@pytest.mark.parametrize("once", [1, 1 << 30])
def test_layers_one_by_one_or_together(world: RandomKV, once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the same: what stands where, what is known of it, and what a crop puts back."""
    monkeypatch.setattr(summarize, "_BYTES_AT_ONCE", once)
    arranged = []
    arrange = Shuffled.arrange

    def counting(self: Shuffled, keys: Tensor, asked: Tensor | None) -> Arrangement:
        arranged.append(keys.shape[0])
        return arrange(self, keys, asked)

    monkeypatch.setattr(Shuffled, "arrange", counting)
    driver = new_driver(method=Shuffled())
    driver.step(world, 0, 200)
    driver.step(world, 200, 201)
    assert len(arranged) == (1 if once > 1 else SHAPE.layers)
    assert sum(arranged) == SHAPE.layers * len(world.keys[0]) * len(stops(driver))
    for layer in range(SHAPE.layers):
        assert moved(driver, layer)[:, 1:22].any()
        assert torch.equal(driver.cache.layers[layer].keys, world.keys[layer][:, :, :201])
    driver.cache.check_integrity()
    driver.cache.crop(-100)
    driver.cache.check_integrity()
    for layer in range(SHAPE.layers):
        assert torch.equal(driver.cache.layers[layer].keys, world.keys[layer][:, :, :101])


def test_copies_are_independent(world: RandomKV) -> None:
    driver = new_driver()
    driver.step(world, 0, 200)
    driver.step(world, 200, 201)
    twin = deepcopy(driver.cache)
    twin.crop(-150)
    driver.cache.check_integrity()
    twin.check_integrity()
    assert stops(driver) == [8, 15, 22]
    assert torch.equal(driver.cache.layers[0].keys, world.keys[0][:, :, :201])
    assert torch.equal(twin.layers[0].keys, world.keys[0][:, :, :51])


def test_integrity_sees_lost_positions(world: RandomKV) -> None:
    driver = new_driver()
    driver.step(world, 0, 200)
    driver.step(world, 200, 201)
    for name in ("_shifts", "_partition"):
        broken = deepcopy(driver.cache)
        array = getattr(broken.layers[1].store.regrouped, name)
        array.chunks[0][3] += 1
        with pytest.raises(CacheStateError, match="integrity"):
            broken.check_integrity()
    driver.cache.check_integrity()


def test_integrity_sees_a_regrouped_page_in_the_recent_window(world: RandomKV) -> None:
    driver = new_driver()
    driver.step(world, 0, 200)
    driver.step(world, 200, 201)
    with patch.object(cluster, "in_order", lambda shared, valid, length: shared.sequences.stretches):
        driver.cache.crop(-20)
    with pytest.raises(CacheStateError, match="run of positions"):
        driver.cache.check_integrity()


def test_other_methods_keep_no_positions(world: RandomKV) -> None:
    driver, twin = new_driver(method=ShadowKV()), new_driver()
    for each in (driver, twin):
        each.step(world, 0, 200)
        each.step(world, 200, 201)
    assert driver.cache.layers[0].store.regrouped is None
    rows = twin.cache._shared.sequences.segments_in_use * 32 * SHAPE.kv_heads * SHAPE.layers
    tables, none = twin.cache.stats().metadata, driver.cache.stats().metadata
    assert (tables["regrouped shifts"], tables["regrouped partitions"]) == (rows * 16, rows * 2)
    assert not any("regrouped" in name for name in none)
    assert (tables["stretches"] > 0, none["stretches"]) == (True, 0)
    budgets = [each.cache.layers[0].store.budget.regrouping_bytes for each in (twin, driver)]
    assert budgets == [18, 0]
