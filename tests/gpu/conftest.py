"""On a GPU as on a CPU, arrays of tiny models grow in small steps: their caps are some 100 kB."""

from __future__ import annotations

import pytest

from tests.support.tuning import grow_by_segments


@pytest.fixture(autouse=True)
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment at a time, but where what the allocator does is tested."""
    if request.module.__name__.rpartition(".")[2] not in ("test_gpu_memory", "test_out_of_memory"):
        grow_by_segments(monkeypatch)
