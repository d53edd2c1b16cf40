"""Ranks agree: caps, batches and options are the same on all, and an error on one is raised on all, with nothing changed."""

from __future__ import annotations

import functools
from dataclasses import asdict
from typing import Any

import pytest
import torch

from spin_hf import SpinCache
from spin_hf.config import Tuning
from tests.support.memory import SMALL_ZONES
from tests.support.rank_cases import last_logits, prompt_and_steps, sequences
from tests.support.ranks import Raised, rank_pool, saved_model, whole_model
from tests.support.tuning import tuned
from tests.support.zoo import random_tokens

LLAMA = "llama"


def refusals(case: str, *arguments: Any, size: int = 2) -> list[str]:
    """Type and text of the error of each rank. The process group works afterwards."""
    found = rank_pool().run(size, case, saved_model(LLAMA), *arguments, may_raise=True)
    assert all(isinstance(each, Raised) for each in found), found
    after = rank_pool().run(size, "options_by_rank", saved_model(LLAMA), [{}] * size)
    assert len(after) == size
    return [f"{each.kind}: {each.text}" for each in found]


def test_stats_are_summed_on_request() -> None:
    options = {"budget": 16, **SMALL_ZONES, "gpu_memory": 60_000}
    whole = whole_model(saved_model(LLAMA))
    cache = SpinCache(whole, **{**options, "gpu_memory": 120_000})
    tokens = sequences(whole, cache, random_tokens(2, 90))
    expected = cache.stats()
    for found, own, summed in rank_pool().run(2, "generated", saved_model(LLAMA), options, 2, 90):
        assert torch.equal(found, tokens)
        assert (own["sequences"], own["tokens"]) == (expected.sequences, expected.tokens)
        for name in ("pages", "gpu_bytes", "cpu_bytes", "sparse_queries", "loads", "mandatory_frames"):
            assert summed[name] == getattr(expected, name), name
            assert own[name] < summed[name] or not summed[name], name
        assert summed["cpu_bytes"] > 0
        assert summed["attended_tokens"] == pytest.approx(expected.attended_tokens)
        assert summed["hit_rate"] == pytest.approx(expected.hit_rate)


def test_the_smallest_cap_counts_and_host_memory_is_divided() -> None:
    given = [{"gpu_memory": 500_000, "cpu_memory": 2_000_000}, {"gpu_memory": 400_000, "cpu_memory": 3_000_000}]
    for caps in rank_pool().run(2, "options_by_rank", saved_model(LLAMA), given):
        assert caps == {"gpu_memory": 400_000, "cpu_memory": 1_000_000}


def test_ranks_have_the_tuning_of_the_test() -> None:
    """Else tests would compare ranks that read all tokens with one process that selects pages."""
    with tuned(slack_tokens=11, dense_factor=0):
        found = rank_pool().run(2, "tuning_by_rank")
    assert [(each["slack_tokens"], each["dense_factor"]) for each in found] == [(11, 0)] * 2
    assert rank_pool().run(2, "tuning_by_rank") == [asdict(Tuning())] * 2


@pytest.mark.parametrize(
    ("case", "arguments", "message"),
    [
        ("options_by_rank", [[{"budget": 64}, {"budget": 65}]], "OptionError: options: expected the same on all ranks"),
        ("options_by_rank", [[{}, {"budget": -1}]], "BudgetError: budget=-1 is below"),
        ("batches_by_rank", [[40, 41]], "CacheStateError: ranks: expected the same call on all ranks"),
        ("makes", ["store"], "OptionError: store: expected None"),
        ("makes", ["config"], "OptionError: model: expected the model"),
    ],
)
def test_what_differs_is_refused_on_all_ranks(case: str, arguments: list[Any], message: str) -> None:
    first, second = refusals(case, *arguments)
    assert first == second
    assert message in first


def test_a_cap_that_cannot_hold_a_step() -> None:
    first, second = refusals("generated", {"gpu_memory": 20_000, **SMALL_ZONES}, 2, 150)
    assert first == second
    assert "BudgetError: gpu_memory=20000" in first


@functools.cache
def undisturbed() -> torch.Tensor:
    """Logits of one process."""
    model = whole_model(saved_model(LLAMA))
    return torch.stack(last_logits(model, SpinCache(model, budget=1 << 20), prompt_and_steps()))


@pytest.mark.parametrize(
    ("place", "skips", "in_steps", "options"),
    [
        ("first batch", 0, False, {}),
        ("pages", 0, False, {}),
        ("pages", 12, False, {}),  # in the second layer
        ("pages", 0, True, {}),
        ("frames", 0, False, {"gpu_memory": 70_000}),
        ("frames", 0, True, {"gpu_memory": 70_000}),
        ("copies", 0, True, {}),
    ],
)
def test_a_rank_that_runs_out_of_memory(place: str, skips: int, in_steps: bool, options: dict[str, Any]) -> None:
    """All ranks raise its error and hold what they held; the same call then succeeds."""
    options = {"budget": 1 << 20, **SMALL_ZONES, **options}
    found = rank_pool().run(2, "out_of_memory", saved_model(LLAMA), place, skips, in_steps, options)
    errors = {each[0] for each in found}
    assert len(errors) == 1
    assert str(errors.pop()).startswith("CapacityError: pages and summaries")
    assert [each[1] for each in found] == [False, True]
    for _, _, (before, after), logits in found:
        assert before == after
        assert bool(before) == in_steps
        if place != "copies":
            torch.testing.assert_close(logits, undisturbed(), rtol=0, atol=1e-4)
