"""Saved caches of tensor-parallel models: another number of ranks loads them and goes on with the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from spin_hf import SavedCacheError, SpinCache
from spin_hf.persistence.shards import PIECE_BYTES
from spin_hf.storage.chunked_array import ChunkedArray
from tests.support.inspection import state_of
from tests.support.late_copies import copies_are_late
from tests.support.memory import SMALL_ZONES
from tests.support.rank_cases import load_and_go_on, save_and_go_on
from tests.support.ranks import Raised, four_heads, rank_pool, saved_model, whole_model

SPARSE: dict[str, Any] = {"budget": 16, **SMALL_ZONES}
LENGTHS = [93, 71]
PAIRS = [(2, 2), (2, 1), (1, 2), (2, 4), (4, 2), (4, 1), (1, 4)]
"""Ranks that save, and ranks that load."""


def save(model: str, size: int, target: Path, options: dict[str, Any]) -> torch.Tensor:
    if size == 1:
        return save_and_go_on(whole_model(model), str(target), options, LENGTHS)
    found = rank_pool().run(size, "saved", model, str(target), options, LENGTHS)
    assert all(torch.equal(each, found[0]) for each in found)
    return found[0]


def load(model: str, size: int, target: Path, options: dict[str, Any]) -> list[torch.Tensor]:
    if size == 1:
        return [load_and_go_on(whole_model(model), str(target), options, LENGTHS)]
    return rank_pool().run(size, "restored", model, str(target), options, LENGTHS)


@pytest.mark.sweep(keep=[0, 1, 2])
@pytest.mark.parametrize(("savers", "loaders"), PAIRS)
def test_another_number_of_ranks(savers: int, loaders: int, tmp_path: Path) -> None:
    expected = save(four_heads(), savers, tmp_path, SPARSE)
    for found in load(four_heads(), loaders, tmp_path, {}):
        assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("savers", "loaders"), PAIRS)
@pytest.mark.parametrize(
    ("options", "gpu_memory"),
    [
        ({"method": "shadowkv"}, None),
        ({"method": "retroinfer"}, None),
        ({"method": "bisection", "cpu_dtype": "int8"}, 320_000),
        ({"method": "quest"}, 480_000),
    ],
    ids=str,
)
def test_methods_and_tiers(
    savers: int, loaders: int, options: dict[str, Any], gpu_memory: int | None, tmp_path: Path
) -> None:
    """`gpu_memory` is that of all heads."""

    def caps(size: int) -> dict[str, int]:
        return {} if gpu_memory is None else {"gpu_memory": gpu_memory // size}

    expected = save(four_heads(), savers, tmp_path, {**SPARSE, **options, **caps(savers)})
    for found in load(four_heads(), loaders, tmp_path, caps(loaders)):
        assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "olmo2", "phi3", "gpt_oss", "qwen3"])
@pytest.mark.parametrize(("savers", "loaders"), [(2, 1), (1, 2), (2, 2)])
def test_windows_and_gathered_heads(family: str, savers: int, loaders: int, tmp_path: Path) -> None:
    expected = save(saved_model(family), savers, tmp_path, SPARSE)
    for found in load(saved_model(family), loaders, tmp_path, {}):
        assert torch.equal(found, expected)


@pytest.mark.sweep(keep=[1])
@pytest.mark.parametrize("method", ["retroinfer", "fitted"])
def test_clusters_on_their_way_to_a_gpu(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds anything, copies are late, and heads of the second part come last. Clusters are checked behind it."""
    options, lengths = {"method": method, "budget": 64, **SMALL_ZONES}, [1160, 1141]
    model = whole_model(four_heads())
    expected = rank_pool().run(2, "saved", four_heads(), str(tmp_path), options, lengths)[0]
    memory_is_dirty(monkeypatch)
    streams = copies_are_late(monkeypatch, PIECE_BYTES)
    loaded = SpinCache.from_pretrained(tmp_path, model)
    assert sum(stream.copies for stream in streams) > 0
    loaded.check_integrity()
    assert state_of(loaded).sequences.spans.num_pages
    assert torch.equal(load_and_go_on(model, str(tmp_path), {}, lengths), expected)
    for number in range(2):
        (file,) = tmp_path.glob(f"ranks-*/rank-{number:05d}-of-00002/*.safetensors")
        whole = file.read_bytes()
        file.write_bytes(with_other_shifts(whole))
        with pytest.raises(SavedCacheError, match="clusters of tokens within their spans"):
            SpinCache.from_pretrained(tmp_path, model, verify=False)
        file.write_bytes(whole)


def memory_is_dirty(monkeypatch: pytest.MonkeyPatch) -> None:
    """New rows of page stores hold other numbers than zeros, as memory of a GPU does."""
    allocate = ChunkedArray._allocate

    def dirty(*args: Any) -> list[torch.Tensor]:
        slabs = allocate(*args)
        for slab in slabs:
            slab.view(torch.uint8).fill_(0x5A)
        return slabs

    monkeypatch.setattr(ChunkedArray, "_allocate", dirty)


def with_other_shifts(file: bytes) -> bytes:
    """A safetensors file in which tokens of the first layer are in other spans."""
    begin = 8 + int.from_bytes(file[:8], "little")
    first, stop = (begin + offset for offset in json.loads(file[8:begin])["layers.0.shifts"]["data_offsets"])
    return file[:first] + b"\x5a" * (stop - first) + file[stop:]


def test_a_rank_that_cannot_write_leaves_the_save_before_it(tmp_path: Path) -> None:
    model = saved_model("llama")
    expected = save(model, 2, tmp_path, SPARSE)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    found = rank_pool().run(2, "saved_without_room", model, str(tmp_path), [50, 40], may_raise=True)
    assert all(isinstance(each, Raised) and each.kind == "SavedCacheError" for each in found)
    assert found[0].text == found[1].text
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    for tokens in load(model, 1, tmp_path, {}):
        assert torch.equal(tokens, expected)


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    model = saved_model("llama")
    save(model, 2, tmp_path, SPARSE)
    whole = whole_model(model)
    facts = json.loads((tmp_path / "spin_cache_ranks.json").read_text())
    for change, message in [
        ({"folder": "../somewhere"}, "expected the name of a folder"),
        ({"ranks": 0}, "'ranks' in spin_cache_ranks.json from 1"),
        ({"version": 7}, "of version 1"),
        ({"ranks": 3}, "expected a folder that SpinCache.save_pretrained wrote"),
    ]:
        (tmp_path / "spin_cache_ranks.json").write_text(json.dumps({**facts, **change}))
        with pytest.raises(SavedCacheError, match=message):
            SpinCache.from_pretrained(tmp_path, whole)
    (tmp_path / "spin_cache_ranks.json").write_text(json.dumps(facts))
    other = tmp_path / "other"
    SpinCache.from_pretrained(tmp_path, whole).save_pretrained(other)
    assert not (other / "spin_cache_ranks.json").exists()
    save_and_go_on(whole, str(tmp_path), SPARSE, LENGTHS)  # one rank replaces the save of two
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(("ranks-", "spin_cache_ranks"))]
