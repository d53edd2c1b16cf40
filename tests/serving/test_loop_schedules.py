"""Random schedules: the tokens of each request are those of the request alone, whatever joins, leaves, fails or is paused."""

from __future__ import annotations

import pytest

from tests.support.families import FAMILIES
from tests.support.loop_schedules import Schedule

SERVED = [name for name, family in FAMILIES.items() if family.paged and name != "llama4_text"]
QUICK = ["llama", "gemma2", "gpt_oss", "qwen3_next", "gemma3n_text"]
MANY = 100
"""Schedules of each family in the long sweep."""


@pytest.mark.parametrize("family", QUICK)
def test_a_few_schedules(family: str) -> None:
    for seed in range(2):
        Schedule(family, seed).run()


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("family", SERVED)
def test_many_schedules(family: str, part: int) -> None:
    for seed in range(100 + part * MANY // 4, 100 + (part + 1) * MANY // 4):
        Schedule(family, seed).run()
