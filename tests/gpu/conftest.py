"""On a GPU as on a CPU, arrays of tiny models grow in small steps, as their caps are some 100 kB, and steps are sparse."""

from __future__ import annotations

import pytest

from tests.support.tuning import grow_by_segments, tune


@pytest.fixture(autouse=True)
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment at a time, but where what the allocator does is tested."""
    if request.module.__name__.rpartition(".")[2] not in ("test_gpu_memory", "test_out_of_memory"):
        grow_by_segments(monkeypatch)


@pytest.fixture(autouse=True)
def sparse_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense attention would be faster for all contexts of tests. Kernels are compiled when a test launches them."""
    tune(monkeypatch, dense_factor=0, compiles_early=False)
