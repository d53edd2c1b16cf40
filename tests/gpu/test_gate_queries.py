"""Gate queries by the compiled kernel, against the formulas in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.gate_queries import SHAPES, compare_gate_queries

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("shape", [*SHAPES, dict(heads=8, group=16, dim=256, gate_dim=256)], ids=repr)
def test_gate_queries(shape: dict[str, Any]) -> None:
    compare_gate_queries(torch.device("cuda"), **shape)
