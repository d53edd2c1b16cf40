"""Ranks on the CPU: transformers puts them on GPUs where torch is built for these."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def only_on_cpus() -> None:
    """tests/gpu/test_ranks.py has tests of ranks on GPUs."""
    if torch._C._get_accelerator().type != "cpu":
        pytest.skip("transformers places ranks on GPUs with this build of torch")
