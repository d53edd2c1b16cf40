"""Random histories of a cache in a model: at full budget against DynamicCache, sparse against a cache without a cap.

families × methods × operations × tiers × interruptions at random lines. What a case does depends on its seed alone; a failing
one prints what it did, and how to play it again. The first 100 are quick. SPIN_HF_CASES says how many
are played, SPIN_HF_CASES_SEED where they begin:

    SPIN_HF_CASES=6000 pytest tests/differential -m ""    more of them
    python -m tests.differential 1234                     case 1234 alone
"""

from __future__ import annotations

import logging
import os
from unittest.mock import patch

import pytest

from ..cache.regrouping import little_slack
from .case import Case
from .history import History

CASES = int(os.environ.get("SPIN_HF_CASES", "2000"))
QUICK = 100
SEED = int(os.environ.get("SPIN_HF_CASES_SEED", "0"))


def run_case(seed: int) -> str:
    """Play one case; returns what it did."""
    case = Case.draw(seed)
    history = None
    with (
        little_slack(),
        patch.object(logging.getLogger("spin_hf"), "disabled", True),
    ):  # which would say that caps are small
        try:
            history = History(case)
            history.play()
        except Exception as error:
            steps = "\n  ".join(history.log if history else [])
            raise AssertionError(
                f"{type(error).__name__}: {error}\n{case}\n  {steps}\nagain: python -m tests.differential {seed}"
            ) from error
    return "\n  ".join([str(case), *history.log])


SEEDS = [pytest.param(SEED + at, marks=[pytest.mark.slow] * (at >= QUICK)) for at in range(CASES)]


@pytest.mark.parametrize("seed", SEEDS)
def test_history(seed: int) -> None:
    run_case(seed)
