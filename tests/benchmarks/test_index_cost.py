"""Every method is measured on a prompt that it has to cluster, and a machine without a GPU says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.speed import index_cost
from spin_hf.indexing import cluster


def test_all_methods_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    clustered, add = [], cluster._add_spans

    def adding(state: Any, method: Any, stops: list[int], *more: Any) -> None:
        clustered.append((method.name, stops))
        add(state, method, stops, *more)

    monkeypatch.setattr(cluster, "_add_spans", adding)
    rows: dict[str, dict[str, float]] = {}
    ids = torch.randint(64, (1, 1400), generator=torch.Generator().manual_seed(0))
    index_cost.measure_all(model, ids, 1, rows.__setitem__)
    assert list(rows) == ["dense", *index_cost.METHODS]
    pages = {"retroinfer": 8, "bisection": 4}
    assert clustered == [(name, [(1400 - 128) // size]) for name, size in pages.items() for _ in range(2)]
    assert all(rows[name]["prefill_ms"] > 0 for name in rows)
    assert all(rows[name]["cluster_ms"] > 0 for name in index_cost.METHODS)
    assert "retroinfer" in index_cost.line("retroinfer", rows["retroinfer"])


def test_shares() -> None:
    row = index_cost.share({"prefill_ms": 110.0, "cluster_ms": 5.0}, {"prefill_ms": 100.0})
    assert (row["cluster_share"], row["share"]) == (0.05, 0.15)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["index_cost.py", "--output", str(tmp_path / "results.json")])
    with pytest.raises(SystemExit, match="expected a CUDA GPU, found none"):
        index_cost.main()
    assert not list(tmp_path.iterdir())
