"""Runs one case of the differential test."""

from __future__ import annotations

import logging
from unittest.mock import patch

from spin_hf.graph import model_calls
from tests.support.clustering_methods import little_slack
from tests.support.differential.case import Case
from tests.support.differential.history import History


def run_case(seed: int) -> str:
    """Play one case; returns what it did."""
    case = Case.draw(seed)
    history = None
    with (
        little_slack(),
        patch.object(logging.getLogger("spin_hf"), "disabled", True),  # which would say that caps are small
        patch.object(model_calls, "find_model", (lambda *_: None) if case.unseen else model_calls.find_model),
    ):
        try:
            history = History(case)
            history.play()
        except Exception as error:
            steps = "\n  ".join(history.log if history else [])
            raise AssertionError(
                f"{type(error).__name__}: {error}\n{case}\n  {steps}\nagain: python -m tests.differential {seed}"
            ) from error
    return "\n  ".join([str(case), *history.log])
