"""The attention of a SpinCache equals the oracle's with a dense mask, and `stats()` counts the attended tokens exactly.

Grouping, page boundaries, padding and holes, several queries at once, softcap, attention sinks, unequal head sizes. Other ways
in which the same tokens may come (paging, other groupings, crops) are in `test_sparse_invariance.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support.cache_driver import Shape, poisoned_memory
from tests.support.conversation import Step, compare_with_oracle, random_pages, single_steps, without_near_ties
from tests.support.oracle import Rules

RULES = Rules(budget=24, num_sink_tokens=4, recent_window=10)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory():
        yield


def left_padding(lengths: list[int], total: int) -> torch.Tensor:
    """Validity [rows, total] of prompts of these lengths that end at `total`."""
    return torch.arange(total) >= total - torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("group", [1, 2, 4])
def test_groups_of_query_heads(group: int) -> None:
    def run(seed: int) -> None:
        kv = random_pages(Shape(layers=2, kv_heads=2, group=group), 2, 112, seed)
        driver = compare_with_oracle(kv, RULES, single_steps(101, 112))
        assert driver.cache.stats().attended_tokens < 60  # else nothing was left out

    without_near_ties(run)


@pytest.mark.parametrize("prompt", [1, 7, 8, 9, 63, 64, 65, 128])
def test_partly_filled_last_page(prompt: int) -> None:
    def run(seed: int) -> None:
        kv = random_pages(Shape(kv_heads=2, group=2), 1, prompt + 18, seed)
        compare_with_oracle(kv, Rules(budget=16, num_sink_tokens=3, recent_window=1), single_steps(prompt, prompt + 18))

    without_near_ties(run)


def test_from_the_first_token_one_by_one() -> None:
    """Generated tokens are indexed as their pages fill: no prompt was ever seen."""

    def run(seed: int) -> None:
        compare_with_oracle(random_pages(Shape(), 2, 100, seed), Rules(budget=8, recent_window=5), single_steps(0, 100))

    without_near_ties(run)


@pytest.mark.parametrize("budget", [0.1, 0.25, 0.9, 17, 40, 4])
def test_budgets(budget: int | float) -> None:
    def run(seed: int) -> None:
        kv = random_pages(Shape(), 1, 131, seed)
        compare_with_oracle(kv, Rules(budget=budget, num_sink_tokens=4, recent_window=9), single_steps(120, 131))

    without_near_ties(run)


def test_a_share_is_not_rounded_up_by_float32() -> None:
    """0.3 of 400 tokens are 120, fifteen pages; in float32 the product is a little more."""

    def run(seed: int) -> None:
        kv = random_pages(Shape(kv_heads=1, group=1), 1, 401, seed)
        compare_with_oracle(kv, Rules(budget=0.3, recent_window=9), single_steps(398, 401))

    without_near_ties(run)


@pytest.mark.parametrize(("sinks", "recent"), [(0, 1), (1, 8), (9, 33), (16, 64)])
def test_zones(sinks: int, recent: int) -> None:
    def run(seed: int) -> None:
        kv = random_pages(Shape(), 1, 127, seed)
        compare_with_oracle(kv, Rules(budget=16, num_sink_tokens=sinks, recent_window=recent), single_steps(117, 127))

    without_near_ties(run)


@pytest.mark.parametrize(("outliers", "budget"), [(0, 24), (24, 64), (24, 128), (64, 48), (128, 32)])
def test_outlier_pages(outliers: int, budget: int) -> None:
    def run(seed: int) -> None:
        kv = random_pages(Shape(kv_heads=1, group=3), 2, 240, seed)
        rules = Rules(budget=budget, num_sink_tokens=4, recent_window=8, outliers_per_1024=outliers)
        compare_with_oracle(kv, rules, single_steps(234, 240))

    without_near_ties(run)


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_int8_summaries(offset: float) -> None:
    """An offset in a channel that queries do not use makes the int8 steps so large that they change the selection."""

    def run(seed: int) -> None:
        kv = random_pages(Shape(kv_heads=2, group=2), 2, 140, seed)
        kv.keys[0][..., 0] += offset
        if offset:
            kv.queries[0][..., 0] = 0
        rules = Rules(budget=32, recent_window=8, outliers_per_1024=0, int8=True)
        compare_with_oracle(kv, rules, single_steps(131, 140, left_padding([120, 140], 140)))

    without_near_ties(run)


def test_dense_below() -> None:
    """Row 0 holds 40 real tokens and stays dense up to 44; row 1 is past that from the start."""

    def run(seed: int) -> None:
        kv = random_pages(Shape(), 2, 90, seed)
        valid = left_padding([50, 90], 90)
        compare_with_oracle(kv, Rules(budget=8, recent_window=4, dense_below=44), single_steps(80, 90, valid))
        compare_with_oracle(kv.rows([0]), Rules(budget=8, recent_window=4, dense_below=85), single_steps(80, 90))

    without_near_ties(run)


def test_few_tokens_on_many_pages() -> None:
    """Fifty real tokens scattered over a hundred places are still no more than sixty: all are attended to."""

    def run(seed: int) -> None:
        kv = random_pages(Shape(), 2, 100, seed)
        valid = torch.ones((2, 100), dtype=torch.bool)
        valid[0, :90] = torch.arange(90) % 9 < 4
        compare_with_oracle(kv, Rules(budget=8, recent_window=4, dense_below=60), single_steps(95, 100, valid))
        compare_with_oracle(kv, Rules(budget=60, recent_window=4), single_steps(95, 100, valid))

    without_near_ties(run)


def test_left_padding() -> None:
    def run(seed: int) -> None:
        kv = random_pages(Shape(), 4, 110, seed)
        valid = left_padding([110, 97, 41, 12], 110)
        compare_with_oracle(kv, RULES, single_steps(99, 110, valid))
        compare_with_oracle(kv, Rules(budget=0.2, recent_window=10), single_steps(99, 110, valid))

    without_near_ties(run)


def test_holes_in_the_middle() -> None:
    """Holes inside pages, across pages and of full pages: padding is in no mean, no zone and no count."""

    def run(seed: int) -> None:
        kv = random_pages(Shape(), 3, 120, seed)
        valid = torch.ones((3, 120), dtype=torch.bool)
        valid[0, 37:60] = False
        valid[1, ::3] = False
        valid[1, 109:] = True
        valid[2, :5], valid[2, 90:105], valid[2, 50:53] = False, False, False
        for rules in (RULES, Rules(budget=0.3, num_sink_tokens=9, recent_window=17)):
            compare_with_oracle(kv, rules, single_steps(109, 120, valid))

    without_near_ties(run)


def test_mask_that_changes_in_a_second_turn() -> None:
    """The end of row 0's first answer turns out to be padding; later it is real again."""

    def run(seed: int) -> None:
        kv = random_pages(Shape(layers=2), 2, 130, seed)
        first = torch.ones((2, 130), dtype=torch.bool)
        first[1, :13] = False
        second = first.clone()
        second[0, 75:89] = False
        second[1, :21] = False
        steps: list[Step] = single_steps(80, 95, first)
        steps += [(stop, second[:, :stop]) for stop in (105, 106, 107, 108, 125, 126)]
        steps += [(stop, first[:, :stop]) for stop in (127, 128)] + [(stop, None) for stop in (129, 130)]
        compare_with_oracle(kv, RULES, steps)

    without_near_ties(run)


@pytest.mark.parametrize("count", [*range(1, 17)])
def test_several_queries_select_each_for_itself(count: int) -> None:
    def run(seed: int) -> None:
        kv = random_pages(Shape(), 2, 90 + 2 * count, seed)
        valid = left_padding([kv.keys[0].shape[2], 70 + 2 * count], 90 + 2 * count)
        compare_with_oracle(kv, RULES, [(stop, valid[:, :stop]) for stop in (90, 90 + count, 90 + 2 * count)])

    without_near_ties(run)


def test_padding_among_several_queries() -> None:
    def run(seed: int) -> None:
        kv = random_pages(Shape(), 3, 120, seed)
        valid = torch.ones((3, 120), dtype=torch.bool)
        valid[0, 100:105], valid[1, 103:112], valid[2, 111] = False, False, False
        compare_with_oracle(kv, RULES, [(stop, valid[:, :stop]) for stop in (100, 112, 116, 120)])

    without_near_ties(run)


def test_more_than_sixteen_queries_attend_to_all() -> None:
    def run(seed: int) -> None:
        kv = random_pages(Shape(), 2, 120, seed)
        valid = left_padding([120, 88], 120)
        driver = compare_with_oracle(kv, RULES, [(stop, valid[:, :stop]) for stop in (80, 97, 120)])
        assert driver.cache.stats().sparse_queries == 0

    without_near_ties(run)


@pytest.mark.parametrize(("softcap", "with_sinks"), [(2.0, False), (None, True), (1.5, True)])
def test_softcap_and_attention_sinks(softcap: float | None, with_sinks: bool) -> None:
    """Neither changes the choice of pages; both change the weights, in prompts, dense steps and sparse ones."""

    def run(seed: int) -> None:
        kv = random_pages(Shape(kv_heads=2, group=2), 2, 125, seed)
        sinks = torch.tensor([0.5, -1.0, 3.0, 1.0]) if with_sinks else None
        rules = Rules(budget=24, recent_window=10, softcap=softcap)
        valid = left_padding([125, 103], 125)
        for given in (None, valid):
            steps = [(stop, None if given is None else given[:, :stop]) for stop in (90, 91, 99, 118, 119)]
            compare_with_oracle(kv, rules, steps, sink_logits=sinks)

    without_near_ties(run)


@pytest.mark.parametrize(("key_dim", "value_dim"), [(8, 4), (4, 12), (6, 1)])
def test_unequal_head_sizes(key_dim: int, value_dim: int) -> None:
    def run(seed: int) -> None:
        kv = random_pages(Shape(key_dim=key_dim, value_dim=value_dim), 2, 110, seed)
        compare_with_oracle(kv, RULES, [(stop, None) for stop in (90, 91, 97, 110)])

    without_near_ties(run)
