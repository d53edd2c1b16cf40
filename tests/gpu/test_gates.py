"""Gate queries by the compiled kernel, against the formulas in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ..kernels.test_gates import SHAPES, compare

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("shape", [*SHAPES, dict(heads=8, group=16, dim=256, gate_dim=256)], ids=repr)
def test_gate_queries(shape: dict[str, Any]) -> None:
    compare(torch.device("cuda"), **shape)
