"""On a GPU as on a CPU, the caches of tiny models grow by little: their caps are some 100 kB."""

from __future__ import annotations

import pytest

from spin_hf.storage import pages


@pytest.fixture(autouse=True)
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment at a time, but where the allocator's figures are what is tested."""
    if request.module.__name__.rpartition(".")[2] != "test_gpu_memory":
        monkeypatch.setattr(pages, "_GPU_CHUNK_BYTES", 1)
        monkeypatch.setattr(pages, "_MIN_CHUNK_SEGMENTS", 1)
