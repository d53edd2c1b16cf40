"""The interpreted kernels against float64: see `tests/support/float64_bound.py`. `tests/gpu` checks many more cases."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import pytest
import torch

import spin_hf.kernels
from tests.support.cache_driver import Shape, poisoned_memory
from tests.support.float64_bound import ALL, BOXES, SOME, Case, check_against_float64
from tests.support.interpreted_kernels import teach_bfloat16
from tests.support.tuning import tune

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu judges the compiled kernels"),
]


CASES = {
    "boxes": Case(Shape(kv_heads=1, group=3, key_dim=64, value_dim=64), torch.float16, BOXES, (1, 2), (163, 150)),
    "bfloat16": Case(Shape(kv_heads=1, group=7, key_dim=80, value_dim=64), torch.bfloat16, lengths=(9,)),
    "softcap": Case(Shape(kv_heads=1, key_dim=192, value_dim=128), torch.float16, replace(ALL, softcap=2.0), (1, 3)),
    "int8": Case(
        Shape(kv_heads=1, key_dim=64, value_dim=64), torch.float32, replace(SOME, int8=True), (1, 2), (100, 123)
    ),
    "selecting": Case(Shape(key_dim=64, value_dim=64), torch.float32, SOME, (1, 2), (123, 100)),
    "sinks": Case(Shape(key_dim=64, value_dim=64), torch.float16, ALL, (1,), (43, 31), (0.5, -1.0, 3.0, 1.0)),
}


CASES_IN_INT8 = {
    "float16": Case(Shape(kv_heads=1, group=3, key_dim=80, value_dim=64), torch.float16, ALL, (1, 2), (43, 31)),
    "bfloat16": Case(Shape(kv_heads=1, group=7, key_dim=80, value_dim=64), torch.bfloat16, lengths=(41,)),
    "selecting": Case(Shape(key_dim=64, value_dim=64), torch.float32, SOME, (1, 2, 1), (123, 100)),
}


@pytest.mark.parametrize("name", CASES_IN_INT8)
def test_pages_in_int8(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that int8 holds exactly: pages that are loaded and such as are resident, side by side."""
    from spin_hf.kernels.triton_launchers import launchers

    monkeypatch.setattr(spin_hf.kernels, "launchers", lambda device: launchers)
    tune(monkeypatch, programs=8)
    teach_bfloat16(monkeypatch)
    case = replace(CASES_IN_INT8[name], int8_pages=True)
    with poisoned_memory():
        page = 8 * (case.shape.key_dim + case.shape.value_dim) * case.dtype.itemsize
        fixed = 32 * (case.shape.key_dim * case.dtype.itemsize + 16) + 32 * 4
        cap = len(case.lengths) * case.shape.kv_heads * (fixed + 12 * (page + 12))
        stats = check_against_float64(case, torch.device("cpu"), gpu_memory=cap).cache.stats()
    assert stats.loads > 0
    assert stats.hit_rate > 0
    assert stats.cpu_bytes > 0


@pytest.mark.parametrize("name", CASES)
def test_no_worse_than_eager_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from spin_hf.kernels.triton_launchers import launchers

    monkeypatch.setattr(spin_hf.kernels, "launchers", lambda device: launchers)
    tune(monkeypatch, programs=8)
    teach_bfloat16(monkeypatch)
    with poisoned_memory():
        check_against_float64(CASES[name], torch.device("cpu"))
