"""Arrays that grow in small steps, as the caches of tiny models are small."""

from __future__ import annotations

import pytest

from spin_hf.storage import page_store


def segment_by_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let arrays in GPU memory grow by one segment at a time."""
    monkeypatch.setattr(page_store, "_GPU_CHUNK_BYTES", 1)
    monkeypatch.setattr(page_store, "_MIN_CHUNK_SEGMENTS", 1)
