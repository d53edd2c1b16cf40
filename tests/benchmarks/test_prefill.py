"""Rows of the prefill benchmark, on a CPU with a small model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.speed import prefill
from spin_hf.backends import dense, sparse_prompt
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
    """It says where: in the innermost function of the package, or outside."""

    def full(*_: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("no room\nmore about it")

    made = {"tokens": 40, "way": "spin", "new_tokens": 1, "times": 1, "why": "out of GPU memory", "message": "no room"}
    with monkeypatch.context() as patched:
        patched.setitem(prefill.WAYS, "spin", (full, {}))
        row = prefill.row(build_model("llama"), 40, "spin", 1, 1)
    where = row.pop("where")
    assert row == made
    assert where.startswith("test_prefill.py:")
    assert where.endswith(" full")
    monkeypatch.setattr(dense, "attend_in_pieces", full)
    row = prefill.row(build_model("llama"), 40, "spin", 1, 1)
    where = row.pop("where")
    assert row == made
    assert where.startswith("spin_hf/backends/dense.py:")
    assert where.endswith(" attend_all")


def test_a_sparse_way_reads_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    lists: list[Any] = []
    original = sparse_prompt.kernels.attend_blocks

    def noting(query: Any, keys: Any, values: Any, chosen: Any, *rest: Any, **named: Any) -> Any:
        lists.append(chosen)
        return original(query, keys, values, chosen, *rest, **named)

    monkeypatch.setattr(sparse_prompt.kernels, "attend_blocks", noting)
    choose = sparse_prompt.kernels.choose_blocks
    row = prefill.row(build_model("llama"), 2560, "spin, sparse, 30 % of blocks", 1, 1)
    assert row["seconds"] > 0
    (mask,) = {id(each): each.mask(20) for each in lists}.values()  # drawn once
    counts = mask.sum(-1)[0, 0].tolist()
    assert counts == [min(i + 1, max(2, -(-3 * (i + 1) // 10))) for i in range(16)] + [17, 18, 19, 20]
    assert all(bool(mask[..., i, i].all()) and bool(mask[..., i, 0].all()) for i in range(20))
    assert not bool(mask.triu(1).any())
    assert sparse_prompt.kernels.choose_blocks is choose
