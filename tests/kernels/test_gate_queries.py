"""Gate queries by the kernel interpreted on the CPU, against the formulas in float64; `tests/gpu` has the kernel itself."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch

from tests.support.gate_queries import SHAPES, compare_gate_queries

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu runs the kernels themselves"),
]


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_gate_queries(shape: dict[str, Any]) -> None:
    compare_gate_queries(torch.device("cpu"), **shape)
