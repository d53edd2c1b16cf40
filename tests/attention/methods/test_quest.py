"""Quest against the oracle: boxes of pages of 16 tokens, dense first layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from spin_hf import OptionError, OptionTypeError, Quest
from tests.support.cache_driver import Shape, poisoned_memory
from tests.support.conversation import compare_with_oracle, random_pages, single_steps, without_near_ties
from tests.support.oracle import Rules

RULES = Rules(budget=32, num_sink_tokens=4, recent_window=10, quest=True)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory():
        yield


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("prompt", [1, 15, 16, 17, 150])
def test_choice(prompt: int, group: int) -> None:
    def run(seed: int) -> None:
        compare_with_oracle(
            random_pages(Shape(kv_heads=2, group=group), 2, prompt + 20, seed), RULES, single_steps(prompt, prompt + 20)
        )

    without_near_ties(run)


def test_the_first_layers_leave_nothing_out() -> None:
    def run(seed: int) -> None:
        driver = compare_with_oracle(
            random_pages(Shape(layers=3), 1, 160, seed), replace(RULES, dense_layers=2), single_steps(150, 160)
        )
        assert driver.cache.stats().attended_tokens > 100

    without_near_ties(run)


def test_padding_in_the_middle_of_pages_several_queries_and_a_share() -> None:
    def run(seed: int) -> None:
        valid = torch.ones((3, 150), dtype=torch.bool)
        valid[0, 33:70], valid[1, ::3], valid[2, :21] = False, False, False
        valid[1, 120:] = True
        for rules in (RULES, replace(RULES, budget=0.3)):
            kv = random_pages(Shape(), 3, 150, seed)
            compare_with_oracle(kv, rules, [(stop, valid[:, :stop]) for stop in (130, 131, 135, 150)])

    without_near_ties(run)


def test_paged() -> None:
    def run(seed: int) -> None:
        kv = random_pages(Shape(kv_heads=1), 2, 200, seed)
        driver = compare_with_oracle(kv, RULES, single_steps(180, 200), gpu_memory=22_000)
        assert driver.cache.stats().evictions > 0

    without_near_ties(run)


@pytest.mark.parametrize(("given", "error"), [(-1, OptionError), (True, OptionTypeError), (1.5, OptionTypeError)])
def test_parameters(given: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="dense_layers"):
        Quest(given)
