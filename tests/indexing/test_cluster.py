"""When tokens are clustered, when their pages are put back in order, and what sequences share of them.

`tests/contract/test_clustering.py` compares what clustered pages give, `tests/differential/test_state_machine.py` has random
histories.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from spin_hf import RetroInfer, ShadowKV
from spin_hf.attention.methods.clustering import TokenClusters
from spin_hf.config import Tuning
from spin_hf.indexing import cluster
from spin_hf.storage.clustered_spans import pages_that_may_move
from spin_hf.storage.page_store import PageStore
from spin_hf.storage.token_permutation import is_permutation
from tests.support.cache_driver import CacheDriver, RandomKV, Shape
from tests.support.clustered_pages import LENGTH, SHAPE, clustered, moved, new_driver, span_ends
from tests.support.clustering_methods import Backwards, Clumped, Shuffled, clustering_often
from tests.support.inspection import state_of
from tests.support.tuning import tune, tuned


def test_spans_of_a_growing_context(kv: RandomKV) -> None:
    """At 200 tokens 17 are recent: the 21 pages before them make equal spans of at most 64 tokens. Later spans have three."""
    driver = new_driver(method=Backwards())
    driver.step(kv, 0, 200)
    assert span_ends(driver) == []
    driver.step(kv, 200, 201)
    assert span_ends(driver) == [8, 15, 22]
    positions = clustered(driver).positions(0, 26)
    assert positions[0, 0, 1].tolist() == list(range(63, 55, -1))  # page 0 has the sinks
    assert torch.equal(positions[:, :, 22:], torch.arange(176, 208).view(4, 8).expand(3, 2, -1, -1))
    for position in range(201, 250):
        driver.step(kv, position, position + 1)
        driver.cache.check_integrity()
    assert span_ends(driver) == [8, 15, 22, 25, 28]


def test_a_step_that_begins_a_segment_does_not_cluster(kv: RandomKV) -> None:
    """Of 16 recent tokens and segments of 256: pages 27 to 29 are due at 256 tokens, with the first step of a segment."""
    driver = new_driver(method=Backwards(), recent_window=8)
    driver.step(kv, 0, 136)
    ends, segments = {}, {}
    for position in range(136, 260):
        driver.step(kv, position, position + 1)
        ends[position], segments[position] = span_ends(driver)[-1], state_of(driver.cache).sequences.segments_in_use
    assert [ends[position] for position in (136, 231, 232, 255, 256, 257, 259)] == [15, 24, 27, 27, 27, 30, 30]
    assert [segments[position] for position in (255, 256, 257)] == [3, 6, 6]
    driver.cache.check_integrity()


def test_clustering_leaves_memory_alone(kv: RandomKV) -> None:
    """Growing spans move no rows: nothing is reserved again, and what kernels know of the layers' memory stays true."""
    driver = new_driver(method=Backwards())
    driver.step(kv, 0, 200)
    for position in range(200, 216):
        driver.step(kv, position, position + 1)
    sequences, spans = state_of(driver.cache).sequences, len(span_ends(driver))
    versions = sequences.memory_version, sequences.past_version
    with patch.object(PageStore, "reserve", side_effect=AssertionError("reserved")):
        for position in range(216, 220):
            driver.step(kv, position, position + 1)
    assert len(span_ends(driver)) == spans + 1
    assert (sequences.memory_version, sequences.past_version) == (versions[0], versions[1] + 1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("page_size", "sinks", "window"), [(4, 4, 16), (8, 3, 17), (4, 0, 0), (8, 40, 80), (16, 5, 1)])
def test_pages_that_may_move(page_size: int, sinks: int, window: int, padded: bool) -> None:
    for length in (*range(1, 60), 101):
        valid = torch.ones((2, length), dtype=torch.bool)
        if padded:
            valid[0, : length // 3] = False
        found = pages_that_may_move(valid if padded else None, 2, length, page_size, sinks, window)
        for row, tokens in enumerate(valid.tolist()):
            for page in range(length // page_size):
                before, behind = sum(tokens[: page * page_size]), sum(tokens[(page + 1) * page_size :])
                is_full = all(tokens[page * page_size : (page + 1) * page_size])
                assert bool(found[row, page]) == (is_full and before >= sinks and behind >= window)


@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("wrong", [None, -1, -7, 4, 9, 2])
def test_is_permutation(wrong: int | None, place: int) -> None:
    order = torch.tensor([[[2, 0, 3, 1], [3, 2, 1, 0]], [[0, 1, 2, 3], [1, 0, 3, 2]]])
    if wrong is not None:
        order[1, 0, place] = wrong  # instead of its place
    assert bool(is_permutation(order)) == (wrong is None)


@pytest.mark.parametrize(("prompt", "tokens"), [(256, 1), (255, 2)])
def test_other_steps_that_begin_a_segment_cluster(kv: RandomKV, prompt: int, tokens: int) -> None:
    """Behind a prompt, and with several tokens."""
    driver = new_driver(method=Backwards(), recent_window=8)
    driver.step(kv, 0, prompt)
    with patch.object(cluster, "grow", lambda state: None):
        for position in range(prompt, 256):
            driver.step(kv, position, position + 1)
    driver.step(kv, 256, 256 + tokens)
    assert span_ends(driver) == [8, 15, 22, 29]


def test_spans_of_the_default_sizes() -> None:
    """A prompt of 4,000 tokens is one span; the recent window, 64 tokens, and less than 1,024 tokens stay."""

    @dataclass(frozen=True)
    class Ordinary(Backwards):
        span_tokens, cluster_interval = 8192, 1024

    shape = Shape(layers=1, kv_heads=1, group=1)
    kv = RandomKV.random(shape, 1, 4800, seed=1)
    with tuned(slack_tokens=Tuning.slack_tokens):
        driver = CacheDriver(shape, method=Ordinary(), budget=64)
    driver.step(kv, 0, 4000)
    driver.step(kv, 4000, 4001)
    assert span_ends(driver) == [(4000 - 128) // 8]
    driver.step(kv, 4001, 4800)
    assert len(span_ends(driver)) == 1


@pytest.mark.parametrize(
    ("removed", "left"),
    [(1, [8, 15, 22]), (16, [8, 15, 22]), (17, [8, 15]), (72, [8, 15]), (73, [8]), (190, []), (201, [])],
)
def test_crops(kv: RandomKV, removed: int, left: list[int]) -> None:
    """The slack of 8 tokens spares a span. A crop that reaches into its pages, or moves the window there, does not."""
    driver = new_driver()
    driver.step(kv, 0, 200)
    driver.step(kv, 200, 201)
    assert span_ends(driver) == [8, 15, 22]
    driver.cache.crop(-removed)
    driver.cache.check_integrity()
    assert span_ends(driver) == left
    kept = 201 - removed
    if kept:
        assert torch.equal(driver.cache.layers[2].keys, kv.keys[2][:, :, :kept])
    for stop in range(kept + 1, kept + 4):
        driver.step(kv, stop - 1, stop)
        driver.cache.check_integrity()


def test_what_stays_in_its_place(kv: RandomKV) -> None:
    """Sinks after left padding, padded pages, and the recent window of a row that ended early."""
    valid = torch.ones((3, LENGTH), dtype=torch.bool)
    valid[0, :21], valid[1, 83:92], valid[2, 120:220] = False, False, False
    driver = new_driver(num_sink_tokens=5)
    driver.step(kv, 0, 220, valid[:, :220])
    driver.step(kv, 220, 221, valid[:, :221])
    pages = state_of(driver.cache).sequences.spans.num_pages
    assert pages == (220 - 17) // 8
    stays = ~moved(driver)
    assert stays[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 25, 26, 27]  # tokens 21 to 25 are the sinks
    assert stays[1].nonzero().flatten().tolist() == [0, 9, 10, 11, 25, 26, 27]  # page 9 is left alone in its span
    # Tokens 103 to 119 are the last 17 of row 2, and pages 15 to 27 are padding
    assert stays[2].nonzero().flatten().tolist() == [0, *range(12, 28)]
    driver.cache.check_integrity()


def test_how_many_tokens_at_once_does_not_matter(kv: RandomKV, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of several lengths, rows and spans, clustered together or one by one."""
    valid = torch.ones((3, LENGTH), dtype=torch.bool)
    valid[0, :21], valid[1, 83:92], valid[2, 120:220] = False, False, False
    found = []
    for tokens in (1 << 15, 300, 8):
        tune(monkeypatch, cluster_tokens=tokens)
        driver = new_driver(method=Backwards())
        driver.step(kv, 0, 390, valid[:, :390])
        with patch.object(Backwards, "form_clusters", autospec=True, side_effect=Backwards.form_clusters) as formed:
            driver.step(kv, 390, 391, valid[:, :391])
        driver.cache.check_integrity()
        shapes = [call.args[1].shape for call in formed.call_args_list]
        runs = [shape[0] // SHAPE.layers for shape in shapes]  # each of all layers
        assert all(many == 1 or many * shape[2] <= tokens for many, shape in zip(runs, shapes, strict=True))
        found.append((len(shapes), span_ends(driver), clustered(driver, 2).positions(0, 46).tolist()))
    assert found[0][0] < found[1][0] < found[2][0]
    assert found[0][1:] == found[1][1:] == found[2][1:]


def test_padding_that_changes(kv: RandomKV) -> None:
    """A token in page 9 becomes padding: the span [8, 15) and the one after it are put back, and clustered again."""
    driver = new_driver()
    driver.step(kv, 0, 200)
    driver.step(kv, 200, 201)
    valid = torch.ones((3, 202), dtype=torch.bool)
    valid[1, 75] = False
    driver.step(kv, 201, 202, valid)
    assert span_ends(driver) == [8, 15, 22]
    assert not moved(driver)[1, 9]
    driver.cache.check_integrity()
    assert torch.equal(driver.cache.layers[1].values, kv.values[1][:, :, :202])


def test_a_token_that_turns_real_beside_partitions_of_other_sequences(kv: RandomKV) -> None:
    """Page 9 of row 0 waits for its padding; in others clusters of several pages lie there, and keep their means."""
    driver = new_driver(method=clustering_often(RetroInfer, 64, 24)(cluster_tokens=32))
    valid = torch.ones((3, 202), dtype=torch.bool)
    valid[0, 75] = False
    driver.step(kv, 0, 200, valid[:, :200])
    driver.step(kv, 200, 201, valid[:, :201])
    assert not moved(driver)[0, 9]
    assert (clustered(driver).pages_per_cluster(9, 10)[1:] == 0).any()  # it belongs to one that begins before
    before = span_ends(driver)
    driver.step(kv, 201, 202)
    assert span_ends(driver) == before
    driver.cache.check_integrity()


def test_sinks_that_move(kv: RandomKV) -> None:
    """The first tokens become padding, so later ones become sinks: they must not be in clustered pages."""
    driver = new_driver(num_sink_tokens=16)
    driver.step(kv, 0, 200)
    driver.step(kv, 200, 201)
    assert moved(driver)[0, 2]
    valid = torch.ones((3, 202), dtype=torch.bool)
    valid[0, :8] = False
    driver.step(kv, 201, 202, valid)
    assert not moved(driver)[0, :3].any()
    driver.cache.check_integrity()


def test_what_sequences_share_is_clustered_once(kv: RandomKV) -> None:
    """Three beams of one prompt: clustering copies no segment that all of them share."""
    driver = new_driver()
    sequences = state_of(driver.cache).sequences
    one = kv.rows([0])
    driver.step(one, 0, 300)
    driver.cache.reorder_cache(torch.tensor([0]))
    driver.cache.batch_repeat_interleave(3)
    assert sequences.segments_in_use == 2
    with patch.object(Clumped, "form_clusters", autospec=True, side_effect=Clumped.form_clusters) as form_clusters:
        driver.step(kv.rows([0, 0, 0]), 300, 301)
    assert [call.args[1].shape[0] for call in form_clusters.call_args_list] == [SHAPE.layers * len(span_ends(driver))]
    assert sequences.segments_in_use == 4  # the new token's segment is each beam's own
    driver.cache.check_integrity()


def test_beams_that_differ_do_not_disturb_each_other(kv: RandomKV) -> None:
    """A span over a segment that beams share and one that they do not: each beam gets its own."""
    driver = new_driver(method=Shuffled(), dense_below=1000)
    with patch.object(cluster, "grow", lambda state: None):  # until they differ
        driver.step(kv.rows([0]), 0, 270)
        driver.cache.batch_repeat_interleave(2)
        both = RandomKV(SHAPE, *([x.clone() for x in xs[:3]] for xs in (kv.keys, kv.values, kv.queries)))
        for states in (both.keys, both.values):
            for layer in range(SHAPE.layers):
                states[layer][1, :, :270] = states[layer][0, :, :270]
        both = both.rows([0, 1])
        driver.step(both, 270, 380)
        driver.cache.check_integrity()
    assert state_of(driver.cache).sequences.segments_in_use == 3
    with patch.object(Backwards, "span_tokens", 400):
        driver.step(both, 380, 381)
    assert span_ends(driver) == [(380 - 17) // 8]
    assert state_of(driver.cache).sequences.segments_in_use == 4
    driver.cache.check_integrity()
    for layer in range(SHAPE.layers):
        assert torch.equal(driver.cache.layers[layer].keys, both.keys[layer][:, :, :381])


@pytest.mark.parametrize("once", [1, 1 << 30])
def test_layers_one_by_one_or_together(kv: RandomKV, once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of tokens, their summaries, and the result of a crop are the same."""
    tune(monkeypatch, index_bytes=once)
    clustered_pages = []
    form_clusters = Shuffled.form_clusters

    def counting(self: Shuffled, keys: Tensor, observation_queries: Tensor | None) -> TokenClusters:
        clustered_pages.append(keys.shape[0])
        return form_clusters(self, keys, observation_queries)

    monkeypatch.setattr(Shuffled, "form_clusters", counting)
    driver = new_driver(method=Shuffled())
    driver.step(kv, 0, 200)
    driver.step(kv, 200, 201)
    assert len(clustered_pages) == (1 if once > 1 else SHAPE.layers)
    assert sum(clustered_pages) == SHAPE.layers * len(kv.keys[0]) * len(span_ends(driver))
    for layer in range(SHAPE.layers):
        assert moved(driver, layer)[:, 1:22].any()
        assert torch.equal(driver.cache.layers[layer].keys, kv.keys[layer][:, :, :201])
    driver.cache.check_integrity()
    driver.cache.crop(-100)
    driver.cache.check_integrity()
    for layer in range(SHAPE.layers):
        assert torch.equal(driver.cache.layers[layer].keys, kv.keys[layer][:, :, :101])


def test_copies_are_independent(kv: RandomKV) -> None:
    driver = new_driver()
    driver.step(kv, 0, 200)
    driver.step(kv, 200, 201)
    twin = deepcopy(driver.cache)
    twin.crop(-150)
    driver.cache.check_integrity()
    twin.check_integrity()
    assert span_ends(driver) == [8, 15, 22]
    assert torch.equal(driver.cache.layers[0].keys, kv.keys[0][:, :, :201])
    assert torch.equal(twin.layers[0].keys, kv.keys[0][:, :, :51])


def test_other_methods_keep_no_positions(kv: RandomKV) -> None:
    driver, twin = new_driver(method=ShadowKV()), new_driver()
    for each in (driver, twin):
        each.step(kv, 0, 200)
        each.step(kv, 200, 201)
    assert driver.cache.layers[0].store.permutation is None
    rows = state_of(twin.cache).sequences.segments_in_use * 32 * SHAPE.kv_heads * SHAPE.layers
    tables, none = twin.cache.stats().metadata, driver.cache.stats().metadata
    assert (tables["clustered shifts"], tables["clustered partitions"]) == (rows * 16, rows * 2)
    assert not any("clustered" in name for name in none)
    assert (tables["spans"] > 0, none["spans"]) == (True, 0)
    budgets = [each.cache.layers[0].store.budget.clustering_bytes for each in (twin, driver)]
    assert budgets == [18, 0]
