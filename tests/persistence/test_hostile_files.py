"""Damaged and hostile saved caches: refused with the reason, or what is loaded is right; never more memory than the files.

damaged   bytes, sizes, links, shards of another save; digests and checksum are those of the sound files
hostile   the JSON, headers or tables are changed, and digests and checksum are made to match
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from spin_hf import BudgetError, CapacityError, SavedCacheError, SpinCache, SpinError
from spin_hf.persistence.opened import saved_tokens
from tests.support.gate_files import header_and_tensors
from tests.support.hostile_files import DAMAGES, HOSTILITIES, Change, bytes_of_tensor, hostile_tables, reseal
from tests.support.saved_caches import (
    SPARSE,
    advance,
    change_json,
    prefilled,
    read,
    shards_of,
)
from tests.support.tuning import tuned
from tests.support.zoo import left_padded, random_tokens, subject_model


def clustered() -> SpinCache:
    """Three sequences, two of which share pages, with padding, clusters and tokens; several shards."""
    model = subject_model("llama")
    cache = SpinCache(model, "retroinfer", **SPARSE)
    ids, mask = left_padded([1200, 1100])
    read(model, cache, ids, attention_mask=mask)
    cache.batch_select_indices(torch.tensor([0, 1, 1]))
    return cache


CACHES: dict[str, tuple[str, Callable[[], SpinCache]]] = {
    "clustered": ("llama", clustered), "linear": ("qwen3_next", lambda: prefilled("qwen3_next")),
    "windows": ("gemma3_text", lambda: prefilled("gemma3_text", padded=True)),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, SpinCache]]]:
    """Saved caches by name, with what they hold. Chunks are small, so that memory tells of sizes."""
    made = {}
    with tuned(cpu_chunk_bytes=1, min_chunk_segments=1, max_chunk_segments=1):
        for name, (_, make) in CACHES.items():
            folder, cache = tmp_path_factory.mktemp(name), make()
            size = sum(layer.store.cpu_bytes(1) for layer in cache.paged_layers) or 100_000
            cache.save_pretrained(folder, random_tokens(3 if name == "clustered" else 2, cache.get_seq_length()),
                                  max_shard_bytes=max(size, 60_000))  # fmt: skip
            made[name] = folder, cache
        yield made


@contextmanager
def bounded_memory(folder: Path) -> Iterator[None]:
    """Tensors made in this block take little more than the files. Python's own memory is bounded by the test's end."""
    made, empty = [0], torch.empty

    def counted(*args: Any, **kwargs: Any) -> Any:
        tensor = empty(*args, **kwargs)
        made[0] += tensor.nbytes
        return tensor

    honest = sum(os.stat(folder / file).st_size for file in os.listdir(folder) if os.path.isfile(folder / file))
    torch.empty = counted  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty = empty
    assert made[0] <= 2 * honest + (1 << 20), f"{made[0]} bytes for {honest} bytes of files"


def outcome(name: str, folder: Path, expected: SpinCache, *, exact: bool) -> str:
    """ "refused" with a useful message, or "loaded" and right. Anything else fails."""
    model = subject_model(CACHES[name][0])
    try:
        with bounded_memory(folder):
            found = SpinCache.from_pretrained(folder, model)
    except CapacityError as error:
        raise AssertionError("memory ran out") from error
    except SpinError as error:
        assert "expected" in str(error) or isinstance(error, BudgetError)
        assert "; " in str(error)
        assert len(str(error)) < 1500
        return "refused"
    if exact:
        assert found.get_seq_length() == expected.get_seq_length()
        for ours, theirs in zip(found.layers, expected.layers, strict=True):
            for attribute in ("keys", "values"):
                if getattr(theirs, attribute, None) is not None:
                    assert torch.equal(getattr(ours, attribute), getattr(theirs, attribute))
    try:
        advance(model, found, 0)
    except SpinError:
        pass  # the file says that a layer has fewer tokens, which the next step refuses
    except (RuntimeError, ValueError, TypeError):
        assert not exact or name != "clustered"  # transformers' own layers with other sizes
    return "loaded"


def fuzz(
    name: str, sound: dict[str, tuple[Path, SpinCache]], folder: Path, changes: list[Change], seeds: range, *,
    exact: bool = True,
) -> dict[str, int]:  # fmt: skip
    """Change copies of the sound files and load them; returns how many were refused and loaded."""
    source, expected = sound[name]
    found = {"refused": 0, "loaded": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in seeds:
        rng, place = random.Random(f"{name} {seed}"), folder / str(seed)
        shutil.copytree(source, place)
        change = changes[seed % len(changes)]
        change(place, rng)
        try:
            found[outcome(name, place, expected, exact=exact)] += 1
        except BaseException as error:
            raise AssertionError(f"{change.__name__}, seed {seed}: {type(error).__name__}: {error}") from error
        shutil.rmtree(place)
    if sys.platform == "linux":
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "in KiB"
    return found


@pytest.mark.parametrize("name", CACHES)
def test_damaged_files(name: str, sound: dict[str, tuple[Path, SpinCache]], tmp_path: Path) -> None:
    """All are refused, but where a change gives the same file."""
    found = fuzz(name, sound, tmp_path, DAMAGES, range(90))
    assert found["refused"] >= 85


@pytest.mark.parametrize("name", CACHES)
def test_hostile_files(name: str, sound: dict[str, tuple[Path, SpinCache]], tmp_path: Path) -> None:
    """What is loaded holds the same keys and values: options and versions may be other ones."""
    found = fuzz(name, sound, tmp_path, HOSTILITIES, range(75))
    assert found["refused"] > 50


@pytest.mark.parametrize("name", CACHES)
def test_hostile_tables(name: str, sound: dict[str, tuple[Path, SpinCache]], tmp_path: Path) -> None:
    """Never an index out of bounds: refused, or a cache that works on other numbers."""
    found = fuzz(name, sound, tmp_path, [hostile_tables], range(30), exact=False)
    assert found["loaded"]
    assert name != "clustered" or found["refused"] > 3


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("name", CACHES)
def test_many_more(name: str, part: int, sound: dict[str, tuple[Path, SpinCache]], tmp_path: Path) -> None:
    seeds = range(1000 + 150 * part, 1000 + 150 * (part + 1))
    fuzz(name, sound, tmp_path / "damaged", DAMAGES, seeds)
    fuzz(name, sound, tmp_path / "hostile", HOSTILITIES, seeds)
    fuzz(name, sound, tmp_path / "tables", [hostile_tables], seeds, exact=False)


def test_files_of_another_save_of_the_same_cache(sound: dict[str, tuple[Path, SpinCache]], tmp_path: Path) -> None:
    """Even without digests: every save has an id, in names and headers."""
    _, cache = sound["clustered"]
    for folder in (tmp_path / "one", tmp_path / "two"):
        cache.save_pretrained(folder, max_shard_bytes=200_000)
    theirs, ours = shards_of(tmp_path / "two"), shards_of(tmp_path / "one")
    shutil.copy(theirs[1], ours[1])
    with pytest.raises(SavedCacheError, match="the header of"):
        SpinCache.from_pretrained(tmp_path / "one", subject_model("llama"), verify=False)


CONTRADICTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "heads": ("clustered", lambda made: made["layers"][1].update(heads=4), "as the model has"),
    "kind": ("linear", lambda made: made["layers"][0].update(kind="DynamicLayer"), "layer 0 as"),
    "values": (
        "windows", lambda made: made["layers"][0]["tensors"]["values"]["shape"].reverse(), "as a tensor of 2 sequences",
    ),
    "tokens of values": (
        "windows", lambda made: made["layers"][0]["tensors"]["values"]["shape"].__setitem__(2, 3), "keys and values",
    ),
    "spans": ("clustered", lambda made: made.update(spans=[*made["spans"][::-1], 1]), "spans that ascend"),
}  # fmt: skip


@pytest.mark.parametrize("contradiction", CONTRADICTIONS)
def test_contradictions(contradiction: str, sound: dict[str, tuple[Path, SpinCache]], tmp_path: Path) -> None:
    """Numbers of the JSON that do not fit the model or each other, with a checksum that matches."""
    name, change, message = CONTRADICTIONS[contradiction]
    shutil.copytree(sound[name][0], tmp_path / "copy")
    change_json(tmp_path / "copy", change)
    with pytest.raises(SavedCacheError, match=message):
        SpinCache.from_pretrained(tmp_path / "copy", subject_model(CACHES[name][0]))


def test_a_directory_of_segments_that_do_not_exist(sound: dict[str, tuple[Path, SpinCache]], tmp_path: Path) -> None:
    shutil.copytree(sound["clustered"][0], tmp_path / "copy")
    for file in shards_of(tmp_path / "copy"):
        if "directory" in header_and_tensors(file)[0]:
            with bytes_of_tensor(file, "directory") as content:
                content[:] = b"\x7f" * len(content)
    reseal(tmp_path / "copy")
    with pytest.raises(SavedCacheError, match="a directory of segments"):
        SpinCache.from_pretrained(tmp_path / "copy", subject_model("llama"))


def test_token_ids_behind_a_header_of_any_length(sound: dict[str, tuple[Path, SpinCache]], tmp_path: Path) -> None:
    shutil.copytree(sound["clustered"][0], tmp_path / "copy")
    file = shards_of(tmp_path / "copy")[0]
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    with pytest.raises(SavedCacheError, match="bytes of token ids"):
        saved_tokens(tmp_path / "copy")


def test_token_ids(sound: dict[str, tuple[Path, SpinCache]], tmp_path: Path) -> None:
    source, cache = sound["clustered"]
    assert torch.equal(saved_tokens(source), random_tokens(3, 1200))
    for most in (1000, 10_000, 1 << 30):
        cache.save_pretrained(tmp_path / str(most), random_tokens(3, 1300), max_shard_bytes=max(most, 60_000))
        assert torch.equal(saved_tokens(tmp_path / str(most)), random_tokens(3, 1300)[:, :1200])
    cache.save_pretrained(tmp_path / "known")
    known = saved_tokens(tmp_path / "known")
    assert known is not None, "those that the model was given"
    assert known.shape == (3, 1200)
    unknown = SpinCache.from_cache(DynamicCache(iter(cache)), subject_model("llama"))
    unknown.save_pretrained(tmp_path / "none")
    assert saved_tokens(tmp_path / "none") is None
    for seed in range(40):
        place = tmp_path / f"changed {seed}"
        shutil.copytree(source, place)
        rng = random.Random(seed)
        ([*DAMAGES, *HOSTILITIES])[seed % 14](place, rng)
        try:
            found = saved_tokens(place)
        except SavedCacheError:
            continue
        assert found is None or torch.equal(found, random_tokens(3, 1200))
