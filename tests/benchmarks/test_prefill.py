"""Rows of the prefill benchmark, on a CPU with a small model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.speed import prefill
from tests.support.zoo import build_model


@pytest.mark.parametrize("way", ["spin", "dynamic, chunks of 8192"])
def test_a_row(way: str) -> None:
    row = prefill.row(build_model("llama"), 40, way, 2, 1)
    assert {key: row[key] for key in ("tokens", "way", "new_tokens", "times")} == {
        "tokens": 40, "way": way, "new_tokens": 1, "times": 2,
    }  # fmt: skip
    assert row["seconds"] > 0
    assert "peak_gib" in row


def test_every_call_reads_the_whole_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model, caches = build_model("llama"), []

    def make(model: Any) -> Any:
        caches.append(prefill.DynamicCache(config=model.config))
        return caches[-1]

    monkeypatch.setitem(prefill.WAYS, "dynamic", (make, {}))
    prefill.row(model, 40, "dynamic", 3, 1)
    assert [cache.get_seq_length() for cache in caches] == [40, 40, 40]


def test_a_prompt_that_does_not_fit_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(model: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("no room")

    monkeypatch.setitem(prefill.WAYS, "spin", (full, {}))
    row = prefill.row(build_model("llama"), 40, "spin", 1, 1)
    assert row == {"tokens": 40, "way": "spin", "new_tokens": 1, "times": 1, "why": "out of GPU memory"}
