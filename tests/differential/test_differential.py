"""Random histories of a cache in a model: at full budget against DynamicCache, sparse against a cache without a cap.

families × methods × operations × tiers × interruptions at random lines. What a case does depends on its seed alone; a failing
one prints what it did, and how to play it again. The first 100 are quick. SPIN_HF_CASES says how many
are played, SPIN_HF_CASES_SEED where they begin:

    SPIN_HF_CASES=6000 pytest tests/differential -m ""    more of them
    python -m tests.differential 1234                     case 1234 alone
"""

from __future__ import annotations

import os

import pytest

from tests.support.differential.run import run_case

CASES = int(os.environ.get("SPIN_HF_CASES", "2000"))
QUICK = 100
SEED = int(os.environ.get("SPIN_HF_CASES_SEED", "0"))


SEEDS = [pytest.param(SEED + at, marks=[pytest.mark.slow] * (at >= QUICK)) for at in range(CASES)]


@pytest.mark.parametrize("seed", SEEDS)
def test_history(seed: int) -> None:
    run_case(seed)
