"""Random histories of a cache in a model: at full budget against DynamicCache, sparse against a cache without a cap.

families × methods × operations × tiers × interruptions at random lines. A case depends on its seed alone. A failing case prints
its operations and the command that plays it again. The first 100 are quick. SPIN_HF_CASES is their number, SPIN_HF_CASES_SEED
the first seed:

    SPIN_HF_CASES=6000 pytest tests/differential -m ""    more of them
    python -m tests.differential 1234                     case 1234 alone
"""

from __future__ import annotations

import os

import pytest

from tests.support.differential.run import run_case

CASES = int(os.environ.get("SPIN_HF_CASES", "2000"))
QUICK = 60
SEED = int(os.environ.get("SPIN_HF_CASES_SEED", "0"))


SEEDS = [pytest.param(SEED + at, marks=[pytest.mark.slow] * (at >= QUICK)) for at in range(CASES)]


@pytest.mark.parametrize("seed", SEEDS)
def test_history(seed: int) -> None:
    run_case(seed)
