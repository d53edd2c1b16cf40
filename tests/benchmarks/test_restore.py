"""The sweep of restoring: a row for each setting and way, with the sizes that it names in use."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.speed import restore, stored_prefixes
from spin_hf import SpinCache
from spin_hf.persistence import opened, staging
from tests.support.tiny_llama import tiny_llama


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    cache = SpinCache(model)
    with torch.no_grad():
        model(torch.randint(3, 60, (1, 300)), past_key_values=cache)
    cache.save_pretrained(tmp_path)
    seen: list[tuple[Any, ...]] = []
    load = SpinCache.from_pretrained

    def noted(*args: Any, verify: bool) -> SpinCache:
        seen.append((opened._MOST_THREADS, staging.BLOCK_BYTES, opened._UNIT_BYTES, stored_prefixes.READ_BYTES, verify))
        return load(*args, verify=verify)

    monkeypatch.setattr(SpinCache, "from_pretrained", noted)
    given = argparse.Namespace(threads=[1, 2], blocks=[4], units=[16], times=1)
    rows = list(restore.rows(model, tmp_path, given))
    ways = ("plain reads", "verified", "not verified")
    assert [(row["threads"], row["way"]) for row in rows] == [(threads, way) for threads in (1, 2) for way in ways]
    assert all(row["seconds"] >= 0 and row["block_mib"] == 4 for row in rows)
    assert seen[1:] == [(n, 4 << 20, 16 << 20, 4 << 20, verify) for n in (1, 2) for verify in (True, False)]


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["restore"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="expected a CUDA GPU, found none"):
        restore.main()
