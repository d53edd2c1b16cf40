"""Codes of pages by the kernels, interpreted on the CPU, against the formulas of `fitted_codes`."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from spin_hf import Fitted
from spin_hf.attention.methods import fitted_codes
from spin_hf.backends.triton_indexing import index_completed
from spin_hf.kernels import device_limits
from tests.support.cache_driver import CacheDriver, RandomKV, Shape
from tests.support.clustering_methods import clustering_often, little_slack
from tests.support.coded_pages import assert_same_codes, drawn
from tests.support.inspection import kernels_of
from tests.support.interpreted_kernels import interpret_kernels, teach_bfloat16

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu runs the kernels themselves"),
]

METHOD = clustering_often(Fitted, 64, 32)()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("dims", "dtype", "pages"),
    [
        ((128, 128), torch.bfloat16, 21), ((64, 96), torch.float16, 8), ((16, 16), torch.float32, 24),
        ((80, 48), torch.float32, 5), ((256, 64), torch.bfloat16, 4), ((32, 32), torch.bfloat16, 3),
    ],
)  # fmt: skip
def test_encode_units(
    dims: tuple[int, int], dtype: torch.dtype, pages: int, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spin_hf.kernels.indexing.encode_units import encode_units

    teach_bfloat16(monkeypatch)
    monkeypatch.setattr(device_limits, "shared_memory", lambda device: 1 << 20)
    keys, values, valid, *bases = drawn(2, 3, 24, dims, dtype, padded)
    keys, values, valid = (part[:, :, :pages] for part in (keys, values, valid))
    made = encode_units(keys, values, valid, *((basis.origin, basis.forward, basis.widths) for basis in bases))
    assert made is not None
    assert_same_codes(made, fitted_codes.encode_by_formulas(keys, values, valid, *bases), dims)


@pytest.mark.parametrize("pages", [0, 4])
def test_no_pages_and_too_little_memory(pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from spin_hf.kernels.indexing.encode_units import encode_units

    monkeypatch.setattr(device_limits, "shared_memory", lambda device: (1 << 20) if not pages else 1000)
    keys, values, valid, *bases = drawn(1, 2, 4, (64, 64), torch.float32, False)
    given: Any = [(basis.origin, basis.forward, basis.widths) for basis in bases]
    made = encode_units(keys[:, :, :pages], values[:, :, :pages], valid[:, :, :pages], *given)
    if pages:
        assert made is None
    else:
        assert made is not None
        assert made["codes"].shape == (1, 2, 0, 4, 16)


@pytest.mark.parametrize(
    ("length", "options"),
    [(219, {}), (207, {"padded": True}), (211, {"gpu_memory": 260_000, "cpu_dtype": "int8"}), (223, {"padded": True})],
)
def test_encode_last_unit(length: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step fills the 1st to the 4th page of its unit. The summaries are those that the cache makes by formulas."""
    interpret_kernels(monkeypatch)
    teach_bfloat16(monkeypatch)
    shape, padded = Shape(layers=2, kv_heads=2, group=1, key_dim=32, value_dim=48), options.pop("padded", False)
    world = RandomKV.random(shape, 2, length + 1, seed=length)
    driver = CacheDriver(shape, method=METHOD, budget=16, recent_window=16, **options)
    with little_slack():
        for start, stop in ((0, length), (length, length + 1)):
            valid = torch.rand((2, stop), generator=torch.Generator().manual_seed(1)) < 0.8
            driver.step(world, start, stop, valid | (torch.arange(stop) % 9 == 0) if padded else None)
    layers = [layer.state for layer in driver.cache.paged_layers]
    stop = (length + 1) // 4
    first = (stop - 1) // 4 * 4
    assert all(layer.fitted is not None for layer in layers)
    before = [summaries(layer, first, stop) for layer in layers]
    for layer in layers:
        store = layer.store
        rows = store.rows(first, stop)
        for summary in store.summaries.values():
            for array in summary.arrays:
                poison = torch.full((*rows.shape, *array.row_shape), 111, dtype=array.dtype)
                array.put(summary.rows_of(rows), poison[:, :, :: summary.pages_per_row])
    (step,) = kernels_of(driver.cache)
    index_completed(step, layers)
    for layer, expected in zip(layers, before, strict=True):
        assert_same_codes(summaries(layer, first, stop), expected, (32, 48))
    driver.cache.check_integrity()


def summaries(layer: Any, first: int, stop: int) -> dict[str, Tensor]:
    """What is stored of pages [first, stop) of a layer."""
    rows = layer.store.rows(first, stop)
    return {name: held.take(held.rows_of(rows)) for name, held in layer.store.summaries.items()}
