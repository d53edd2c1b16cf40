"""`generate` of many families at full budget against DynamicCache, and with small budgets for crashes.

Prompts of 100 tokens, padded on the left, weights × 15, windows of 24 tokens. transformers' own generation tests have 7 tokens
and weights of 0.02: attention is then uniform, and a cache that loses half of the tokens passes.

    untiered    budget beyond the context: as DynamicCache
    tiered      the same with the smallest `gpu_memory` that `plan` allows
    small       budgets that leave most tokens out: finite logits of the right shapes
    control     a method that leaves tokens out changes the logits, so the comparison depends on attention

Here are a tiered greedy run and the control of each family. `test_all_ways.py` has the rest:

    pytest tests/generation -m ""
"""

from __future__ import annotations

import pytest

from tests.support.compare import RELATIVE_TOLERANCE, difference
from tests.support.generate_ways import FULL, SMALL, assert_same, expected, smallest, with_spin
from tests.support.more_families import GENERATING

each_family = pytest.mark.parametrize("name", GENERATING)


@each_family
def test_tiered(name: str) -> None:
    ours, caches = with_spin(name, "greedy", gpu_memory=smallest(name, "greedy", **FULL), **FULL)
    assert_same(ours, expected(name, "greedy"))
    for cache in caches:
        cache.check_integrity()
        assert cache.stats().evictions, "nothing was evicted: the cap was not tight"


@each_family
def test_control(name: str) -> None:
    """A tenth of the context is not enough for these models; otherwise the tests above could not fail."""
    ours, caches = with_spin(name, "greedy", method="shadowkv", **SMALL)
    assert caches[0].stats().sparse_queries
    theirs = expected(name, "greedy")
    prompts, steps = (difference(ours[0].logits[step], theirs[0].logits[step]) for step in (0, 1))
    assert prompts <= RELATIVE_TOLERANCE, "a prompt attends to everything"
    assert steps > 100 * RELATIVE_TOLERANCE, f"a method that leaves most out moves logits by {steps:.1e} only"
