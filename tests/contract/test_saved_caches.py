"""`save_pretrained` and `from_pretrained`: a restored cache goes on as the saved one.

Which saved caches a model, method and options accept is in `test_saved_cache_compatibility.py`.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from spin_hf import SavedCacheError, SeerAttention, SpinCache
from tests.support.cache_driver import poisoned_memory
from tests.support.families import FAMILIES
from tests.support.fork_server import finished
from tests.support.gate_files import header_and_tensors
from tests.support.inspection import state_of
from tests.support.memory import with_tight_gpu_memory
from tests.support.saved_caches import (
    SPARSE,
    advance,
    assert_goes_on,
    prefilled,
    read,
    read_json,
    shards_of,
)  # fmt: skip
from tests.support.seer_gates import gates_for
from tests.support.tuning import tuned
from tests.support.zoo import build_model, random_tokens, subject_model

_UNUSUAL = ["hy_v4", "gemma4_shared", "lfm2", "jetmoe", "qwen3_vl"]
METHODS = ["bisection", "shadowkv", "retroinfer", "quest", "fitted"]


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.sweep
def test_every_family_goes_on(family: str, padded: bool, tmp_path: Path) -> None:
    cache = prefilled(family, padded=padded)
    cache.save_pretrained(tmp_path)
    restored = SpinCache.from_pretrained(tmp_path, subject_model(family))
    assert_goes_on(subject_model(family), cache, restored)


def tight(**options: Any) -> SpinCache:
    """The cache of `prefilled("llama")` with the smallest `gpu_memory`, at most."""
    return with_tight_gpu_memory(lambda cap: prefilled("llama", gpu_memory=cap, **options))


def loaded(folder: Path, **options: Any) -> SpinCache:
    """The saved cache, with the smallest `gpu_memory` that loads it."""
    return with_tight_gpu_memory(
        lambda cap: SpinCache.from_pretrained(folder, subject_model("llama"), gpu_memory=cap, **options)
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tiers", ["one to one", "one to two", "two to one", "two to two"])
@pytest.mark.parametrize("cpu_dtype", ["auto", "int8"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.sweep(2)
def test_every_method_and_tier_goes_on(method: str, tiers: str, cpu_dtype: str, padded: bool, tmp_path: Path) -> None:
    model, (before, _, after) = subject_model("llama"), tiers.split()
    options = {"method": method, "cpu_dtype": cpu_dtype, "padded": padded, "tokens": 100}
    with tuned(cluster_tokens=64):
        cache = prefilled("llama", **options) if before == "one" else tight(**options)
        assert (cache.stats().cpu_bytes > 0) == (before == "two")
        cache.save_pretrained(tmp_path)
        restored = SpinCache.from_pretrained(tmp_path, model) if after == "one" else loaded(tmp_path)
    assert (restored.stats().cpu_bytes > 0) == (after == "two")
    if cpu_dtype == "int8" and before != after:  # other numbers from here on, within the error of int8
        for ours, theirs in zip(restored.layers, cache.layers, strict=True):
            tolerance = 2 * float(theirs.keys.abs().max()) / 127
            assert (ours.keys - theirs.keys).abs().max() <= (0.0 if before == "two" else tolerance)
        restored.check_integrity()
        advance(model, restored, 0)
        restored.check_integrity()
        return
    assert_goes_on(model, cache, restored, exact=before == after)


def test_pages_of_several_chunks_are_converted(tmp_path: Path) -> None:
    """A piece of a file is larger than a chunk here."""
    with tuned(cpu_chunk_bytes=1, min_chunk_segments=1, max_chunk_segments=1):
        cache = prefilled("llama", cpu_dtype="int8", tokens=700, steps=0)
        cache.save_pretrained(tmp_path)
        restored = loaded(tmp_path)
    store = restored.paged_layers[0].store
    assert store is not None
    assert store.backing.converted
    assert len(store.backing.chunks) > 3
    for ours, theirs in zip(restored.layers, cache.layers, strict=True):
        for one, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(one, other, rtol=0, atol=2 * float(other.abs().max()) / 127)


def test_clusters_come_back(tmp_path: Path) -> None:
    """A prompt that is not clustered yet is clustered when it is saved; the restored cache holds the same clusters."""
    cache = prefilled("llama", method="retroinfer", tokens=1400, steps=0)
    spans = state_of(cache).sequences.spans
    assert not spans.stops
    cache.save_pretrained(tmp_path)
    restored = SpinCache.from_pretrained(tmp_path, subject_model("llama"))
    ours, theirs = (state_of(each).sequences.spans for each in (restored, cache))
    assert ours.stops == theirs.stops != []
    assert torch.equal(ours.clustered, theirs.clustered)
    assert_goes_on(subject_model("llama"), cache, restored)
    for each in (cache, restored):
        each.crop(-1300)
    assert_goes_on(subject_model("llama"), cache, restored)


def test_seer_goes_on_with_the_same_gates_only(tmp_path: Path) -> None:
    model, places = subject_model("llama"), [tmp_path / name for name in ("gates", "moved", "others")]
    for place, seed in zip(places, (0, 0, 1), strict=True):
        place.mkdir()
        gates_for(model, place, seed=seed)
    cache = prefilled("llama", method=SeerAttention(places[0], threshold=0.001), tokens=140, padded=True)
    cache.save_pretrained(tmp_path / "saved")
    restored = SpinCache.from_pretrained(tmp_path / "saved", model, SeerAttention(places[1], threshold=0.001))
    assert_goes_on(model, cache, restored)
    for method, fact in ((None, "method"), (SeerAttention(places[2], threshold=0.001), "tensors"),
                         (SeerAttention(places[0]), "threshold")):  # fmt: skip
        with pytest.raises(SavedCacheError, match=fact):
            SpinCache.from_pretrained(tmp_path / "saved", model, method)


def test_sequences_share_pages_in_the_file_and_behind_it(tmp_path: Path) -> None:
    model = subject_model("llama")
    sizes = {}
    for repeats in (1, 6):
        cache = SpinCache(model, **SPARSE)
        read(model, cache, random_tokens(1, 400))
        if repeats > 1:
            cache.batch_repeat_interleave(repeats)
        folder = tmp_path / str(repeats)
        cache.save_pretrained(folder)
        sizes[repeats] = sum(file.stat().st_size for file in shards_of(folder))
    assert sizes[6] < 1.1 * sizes[1]
    restored = SpinCache.from_pretrained(folder, model)
    sequences = state_of(restored).sequences
    assert sequences.batch_size == 6
    assert sequences.segments_in_use == len(sequences.directory[0])
    assert_goes_on(model, cache, restored)
    for each in (cache, restored):
        each.reorder_cache(torch.tensor([5, 0, 0, 3, 2, 1]))
    assert_goes_on(model, cache, restored)


def test_segments_in_another_order_and_free_ones(tmp_path: Path) -> None:
    """Rows of the file are numbered anew: beams have left holes in the pool."""
    model = subject_model("llama")
    cache = SpinCache(model, **SPARSE)
    read(model, cache, random_tokens(4, 300))
    for step, rows in enumerate(([3, 1, 1, 0], [2, 2, 0, 3], [1, 3])):
        cache.batch_select_indices(torch.tensor(rows))
        for _ in range(40):
            advance(model, cache, step)
    assert state_of(cache).sequences.free
    cache.save_pretrained(tmp_path, max_shard_bytes=20_000)
    assert len(shards_of(tmp_path)) > 4
    restored = SpinCache.from_pretrained(tmp_path, model)
    assert not state_of(restored).sequences.free
    assert_goes_on(model, cache, restored)


@pytest.mark.parametrize("family", ["llama", "qwen3_next", "gemma3_text"])
def test_several_shards(family: str, tmp_path: Path) -> None:
    cache = prefilled(family)
    cache.save_pretrained(tmp_path, max_shard_bytes=3000)
    assert len(shards_of(tmp_path)) > 5
    assert_goes_on(subject_model(family), cache, SpinCache.from_pretrained(tmp_path, subject_model(family)))


def test_safetensors_reads_the_shards(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    cache = prefilled("llama", steps=0, method="shadowkv")
    cache.save_pretrained(tmp_path, max_shard_bytes=20_000)
    tensors = {name: tensor for file in shards_of(tmp_path) for name, tensor in load_file(file).items()}
    pages = torch.cat([tensors[name] for name in sorted(tensors) if name.startswith("layers.1.pages")])
    segments, heads, per_segment, elements = pages.shape
    first = pages[0, 1].view(per_segment, 2, 8, elements // 16)[:, 0].flatten(0, 1)[:70]
    torch.testing.assert_close(first, cache.layers[1].keys[0, 1], rtol=0, atol=0)
    assert (segments, heads) == (2, 2)


def test_a_fresh_process(tmp_path: Path) -> None:
    """The restored cache gives the tokens that the saved one gives, in a process that has seen nothing else."""
    model = subject_model("llama")
    cache = prefilled("llama", method="bisection", steps=0)
    cache.save_pretrained(tmp_path)
    script = (
        "import sys, torch\n"
        "from spin_hf import SpinCache\n"
        "from tests.support.saved_caches import advance\n"
        "from tests.support.zoo import build_model\n"
        "model = build_model('llama')\n"
        "cache = SpinCache.from_pretrained(sys.argv[1], model)\n"
        "print([advance(model, cache, step)[:, -1].argmax(-1).tolist() for step in range(6)])\n"
    )
    run = finished(script, tmp_path)
    assert run.returncode == 0, run.stderr
    expected = [advance(model, cache, step)[:, -1].argmax(-1).tolist() for step in range(6)]
    assert run.stdout.strip().endswith(str(expected))


def test_a_stack_that_was_cut(tmp_path: Path) -> None:
    """Layers that no forward has reached hold nothing, in the files too."""
    model = build_model("llama")
    model.model.layers = model.model.layers[:1]
    cache = SpinCache(model, **SPARSE)
    read(model, cache, random_tokens(2, 60))
    cache.save_pretrained(tmp_path)
    assert read_json(tmp_path)["layers"][1] == {"kind": "unused"}
    assert_goes_on(model, cache, SpinCache.from_pretrained(tmp_path, model))


@pytest.mark.parametrize("family", [*_UNUSUAL, pytest.param("inkling_text", marks=pytest.mark.slow)])
def test_unusual_layers_go_on(family: str, tmp_path: Path) -> None:
    model = subject_model(family)
    cache = SpinCache(model, **SPARSE)
    read(model, cache, random_tokens(2, 50))
    cache.save_pretrained(tmp_path)
    restored = SpinCache.from_pretrained(tmp_path, model)
    for step in range(5):
        ids = random_tokens(2, 1, seed=step)
        assert torch.equal(read(model, cache, ids), read(model, restored, ids))


def test_no_other_memory_gets_into_the_files(tmp_path: Path) -> None:
    """Places of pages without a token are zero, whatever was in memory."""
    held = []
    for poisoned in (False, True):
        folder = tmp_path / str(poisoned)
        with poisoned_memory() if poisoned else nullcontext():
            cache = prefilled("llama", method="retroinfer", tokens=1330, padded=True)
            cache.batch_select_indices(torch.tensor([1, 0]))
            cache.save_pretrained(folder)
        (shard,) = shards_of(folder)
        held.append(header_and_tensors(shard)[1])
    assert held[0] == held[1]


def test_loaded_in_inference_mode(tmp_path: Path) -> None:
    """Steps outside of it may write to what was loaded inside."""
    cache = prefilled("qwen3_next")
    with torch.inference_mode():
        cache.save_pretrained(tmp_path)
        restored = SpinCache.from_pretrained(tmp_path, subject_model("qwen3_next"))
    assert_goes_on(subject_model("qwen3_next"), cache, restored)


def test_generate_goes_on(tmp_path: Path) -> None:
    model, ids = subject_model("llama"), random_tokens(1, 80)
    cache = SpinCache(model, **SPARSE)
    options: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True}
    held = model.generate(ids, past_key_values=cache, max_new_tokens=5, **options).sequences
    cache.save_pretrained(tmp_path, held)
    prompt = torch.cat([held, random_tokens(1, 9, seed=4)], 1)
    ours, theirs = (
        model.generate(prompt, past_key_values=each, max_new_tokens=10, **options).sequences
        for each in (SpinCache.from_pretrained(tmp_path, model), cache)
    )
    assert torch.equal(ours, theirs)


def test_saving_changes_nothing(tmp_path: Path) -> None:
    model = subject_model("gemma3_text")
    cache = prefilled("gemma3_text")
    twin = copy.deepcopy(cache)
    cache.save_pretrained(tmp_path)
    assert_goes_on(model, twin, cache)


def test_a_cache_made_from_a_config(tmp_path: Path) -> None:
    model = subject_model("llama")
    cache = SpinCache(model.config, **SPARSE)
    read(model, cache, random_tokens(2, 60))
    cache.save_pretrained(tmp_path)
    restored = SpinCache.from_pretrained(tmp_path, model.config)
    assert_goes_on(model, cache, restored)
    del cache, restored
    assert SpinCache.from_pretrained(tmp_path, model).get_seq_length() == 68 - 8


def test_a_model_in_bfloat16_with_int8_summaries(tmp_path: Path) -> None:
    model = build_model("llama").bfloat16()
    cache = SpinCache(model, "shadowkv", **SPARSE)
    read(model, cache, random_tokens(2, 90))
    cache.save_pretrained(tmp_path)
    assert_goes_on(model, cache, SpinCache.from_pretrained(tmp_path, model))
    for other, options in ((model, {"summary_dtype": "model"}), (build_model("llama"), {})):
        with pytest.raises(SavedCacheError, match=r"summaries|dtype"):
            SpinCache.from_pretrained(tmp_path, other, **options)


def test_a_dynamic_cache_that_was_taken_over(tmp_path: Path) -> None:
    model = subject_model("gemma3_text")
    dynamic = DynamicCache(config=model.config)
    read(build_model("gemma3_text"), dynamic, random_tokens(2, 60))
    cache = SpinCache.from_cache(dynamic, model, **SPARSE)
    cache.save_pretrained(tmp_path)
    assert_goes_on(model, cache, SpinCache.from_pretrained(tmp_path, model))
