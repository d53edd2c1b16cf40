"""The pace of reading prompts between steps, the prefixes that waiting prompts share, and choosing tokens."""

from __future__ import annotations

import random
from array import array

import pytest

from spin_hf.serving.pace import Pace
from spin_hf.serving.prefixes import SharedPrefixes


@pytest.mark.parametrize("slowdown", [1.2, 2.0, 5.0])
@pytest.mark.parametrize("fixed_s", [0.0, 0.05])
def test_reading_takes_no_more_than_the_bound(slowdown: float, fixed_s: float) -> None:
    """Over a long prompt with a step of 10 ms, also where every forward takes 50 ms whatever it reads."""
    draw, pace = random.Random(0), Pace(slowdown, least_tokens=128)
    left, steps, reading = 60_000, 0, 0.0
    while left:
        tokens = pace.tokens(min(left, 8192), running=True)
        if tokens:
            seconds = fixed_s + tokens * 1e-5 * draw.uniform(0.8, 1.2)
            pace.read(tokens, seconds, beside_steps=True)
            left, reading = left - tokens, reading + seconds
        pace.stepped(0.01, True)
        steps += 1
    growth = (steps * 0.01 + reading) / (steps * 0.01)
    assert growth <= 1.1 * slowdown + 0.1
    assert growth >= 1 + 0.4 * (slowdown - 1), "the bound is made use of"


def test_nobody_waits_or_no_bound() -> None:
    pace = Pace(2.0, least_tokens=128)
    assert pace.tokens(5000, running=False) == 5000
    assert pace.tokens(5000, running=True) == 0, "no step has been measured"
    assert Pace(None, 128).tokens(5000, running=True) == 5000


def ids(*numbers: int) -> array[int]:
    return array("q", numbers)


def test_the_longest_beginning_of_waiting_prompts() -> None:
    document = list(range(200))
    prompt, shared = ids(*document, 7, 8), SharedPrefixes()
    assert shared.boundary(prompt, 0, [ids(*document, 9)]) == 200
    assert shared.boundary(prompt, 0, [ids(*document[:150], 9), ids(*document[:180], 9)]) == 180
    assert shared.boundary(prompt, 0, [ids(*document, 7, 8)]) == 201, "at least one token is left to read"
    assert shared.boundary(prompt, 200, [ids(*document, 9)]) is None, "it is held already"
    assert shared.boundary(prompt, 0, [ids(*document[:100], 9)]) is None, "too short"
    assert shared.boundary(prompt, 0, []) is None
