"""`plan` predicts a cache's memory to the byte, and refuses what the cache refuses. Metadata is small and grows with tokens.

Caches are filled by hand, layer by layer, so that configs with windows or linear attention need no model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig, T5Config

from spin_hf import (
    BudgetError,
    CapacityError,
    MemoryPlan,
    OptionError,
    OptionTypeError,
    SpinCache,
    UnsupportedModelError,
    plan,
)
from spin_hf.backends import sparse_prompt
from spin_hf.integration.layer_types import decoder_config
from spin_hf.memory import prefill_peak
from spin_hf.memory.layer_budget import LayerShape, layer_shapes
from spin_hf.memory.prefill_peak import key_means_bytes
from tests.support.families import FAMILIES
from tests.support.inspection import forward_of
from tests.support.zoo import build_config, build_model, random_tokens, subject_model

METHODS = ("shadowkv", "quest", "bisection", "retroinfer", "fitted")
ZONES: dict[str, Any] = dict(budget=16, num_sink_tokens=4, recent_window=10)
PLANNED = ("gpu_bytes", "cpu_bytes", "metadata_bytes", "paged_layers", "dense_layers")


def fill(config: Any, batch_size: int, length: int, dtype: torch.dtype = torch.float32, **options: Any) -> SpinCache:
    """A cache whose paged layers got `length` tokens in one call."""
    cache = SpinCache(config, **options)
    add(cache, config, batch_size, length, dtype)
    return cache


def add(cache: SpinCache, config: Any, batch_size: int, length: int, dtype: torch.dtype = torch.float32) -> None:
    layers = cache.paged_layers
    shapes = layer_shapes(config, [layer.layer_idx for layer in layers])
    assert shapes is not None
    for layer, shape in zip(layers, shapes, strict=True):
        states = [torch.randn(batch_size, shape.num_heads, length, dim) for dim in (shape.key_dim, shape.value_dim)]
        layer.append(*(state.to(dtype) for state in states), None)
    forward_of(cache).commit()


def assert_as_planned(made: MemoryPlan, cache: SpinCache) -> None:
    stats = cache.stats()
    for name in PLANNED:
        assert getattr(made, name) == getattr(stats, name), name
    assert made.metadata == {name: held for name, held in stats.metadata.items() if held}
    assert sum(stats.metadata.values()) == stats.metadata_bytes
    frames = [layer.store.frames for layer in cache.paged_layers if layer.store is not None]
    assert made.page_frames == min((0 if held is None else held.num_slots for held in frames), default=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
def test_a_cache_holds_what_was_planned(family: str, method: str) -> None:
    config = build_config(family)
    for batch_size, length in ((1, 5), (3, 300), (2, 700)):
        batch: dict[str, Any] = dict(batch_size=batch_size, context_length=length)
        for dtype in (torch.float32, torch.bfloat16):
            whole = plan(config, **batch, dtype=dtype, method=method, **ZONES)
            assert whole.fits
            assert (whole.largest_batch_size, whole.largest_context_length) == (None, None)
            assert_as_planned(whole, fill(config, batch_size, length, dtype, method=method, **ZONES))
            for cap in {whole.smallest_gpu_memory, whole.gpu_bytes // 2, whole.gpu_bytes * 9 // 10, 10**12}:
                made = plan(config, **batch, dtype=dtype, method=method, gpu_memory=cap, **ZONES)
                assert made.fits == (cap >= whole.smallest_gpu_memory), made
                if made.fits:
                    cache = fill(config, batch_size, length, dtype, method=method, gpu_memory=cap, **ZONES)
                    assert_as_planned(made, cache)
                    assert made.gpu_bytes <= cap


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_in_int8(method: str, dtype: torch.dtype) -> None:
    """The cpu tier takes other bytes, to the byte as planned; the compute tier, the same; so do caps and refusals."""
    config = LlamaConfig(**REAL)
    batch: dict[str, Any] = dict(batch_size=2, context_length=300, dtype=dtype, method=method, **ZONES)
    int8: dict[str, Any] = dict(cpu_dtype="int8")
    whole = plan(config, **batch)
    assert plan(config, **batch, **int8) == whole
    options: dict[str, Any] = dict(
        method=method, gpu_memory=max(whole.gpu_bytes // 2, whole.smallest_gpu_memory), **ZONES
    )
    as_it_is = plan(config, **batch, gpu_memory=options["gpu_memory"])
    made = plan(config, **batch, **int8, gpu_memory=options["gpu_memory"])
    assert (made.gpu_bytes, made.metadata, made.page_frames) == (
        as_it_is.gpu_bytes,
        as_it_is.metadata,
        as_it_is.page_frames,
    )
    assert made.smallest_gpu_memory == as_it_is.smallest_gpu_memory
    numbers = 2 * 128  # of a token: a key and a value
    assert made.cpu_bytes * numbers * dtype.itemsize == as_it_is.cpu_bytes * (numbers + 8)
    assert made.cpu_bytes / as_it_is.cpu_bytes <= 0.52 * 2 / dtype.itemsize
    assert_as_planned(made, fill(config, 2, 300, dtype, **options, **int8))
    assert plan(config, **batch, **int8, gpu_memory=options["gpu_memory"], cpu_memory=made.cpu_bytes).fits
    short: dict[str, Any] = dict(**int8, cpu_memory=made.cpu_bytes - 1)
    refused = plan(config, **batch, **short, gpu_memory=options["gpu_memory"])
    with pytest.raises(CapacityError) as caught:
        fill(config, 2, 300, dtype, **options, **short)
    assert refused.reason == str(caught.value)
    assert caught.value.needed_bytes == made.cpu_bytes


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
@pytest.mark.parametrize("method", METHODS)
def test_the_refusal_is_the_same(family: str, method: str) -> None:
    config = build_config(family)
    options: dict[str, Any] = dict(method=method, **ZONES)
    smallest = plan(config, context_length=600, batch_size=3, **options).smallest_gpu_memory
    made = plan(config, context_length=600, batch_size=3, gpu_memory=smallest - 1, **options)
    with pytest.raises(BudgetError) as caught:
        fill(config, 3, 600, gpu_memory=smallest - 1, **options)
    error = caught.value
    assert not made.fits
    assert made.reason == str(error)
    assert made.smallest_gpu_memory == smallest == error.needed_bytes
    assert error.available_bytes == smallest - 1
    assert made.largest_batch_size == error.fitting_batch_size == 2
    assert_as_planned(made, fill(config, 3, 600, gpu_memory=smallest, **options))


@pytest.mark.parametrize("method", ["shadowkv", "retroinfer"])
def test_cpu_memory(method: str) -> None:
    config = build_config("llama")
    options: dict[str, Any] = dict(method=method, **ZONES)
    tight = plan(config, context_length=600, batch_size=3, **options).smallest_gpu_memory
    pages = plan(config, context_length=600, batch_size=3, gpu_memory=tight, **options).cpu_bytes
    made = plan(config, context_length=600, batch_size=3, gpu_memory=tight, cpu_memory=pages - 1, **options)
    with pytest.raises(CapacityError) as caught:
        fill(config, 3, 600, gpu_memory=tight, cpu_memory=pages - 1, **options)
    error = caught.value
    assert made.reason == str(error)
    assert (error.needed_bytes, error.available_bytes) == (pages, pages - 1)
    assert made.largest_batch_size == error.fitting_batch_size == 2
    # Then only the compute tier is left.
    whole = plan(config, context_length=600, batch_size=3, **options)
    resident = made.smallest_gpu_memory
    assert (made.gpu_bytes, made.cpu_bytes) == (whole.gpu_bytes, 0)
    assert plan(config, context_length=600, batch_size=3, gpu_memory=resident, cpu_memory=1, **options).fits
    with pytest.raises(CapacityError):
        fill(config, 3, 600, gpu_memory=resident - 1, cpu_memory=pages - 1, **options)


@pytest.mark.parametrize("method", METHODS)
def test_the_largest_batch_and_context(method: str) -> None:
    config = build_config("llama")
    options: dict[str, Any] = dict(method=method, gpu_memory=400_000, **ZONES)
    for batch_size, length in ((1, 300), (2, 1200)):
        made = plan(config, batch_size=batch_size, context_length=length, **options)
        most, longest = made.largest_batch_size, made.largest_context_length
        assert most is not None
        assert longest is not None
        assert most > 0
        assert longest > 0
        fill(config, most, length, **options)
        fill(config, batch_size, longest, **options)
        with pytest.raises(BudgetError) as caught:
            fill(config, most + 1, length, **options)
        assert caught.value.fitting_batch_size == most
        with pytest.raises(BudgetError):
            fill(config, batch_size, longest + 1, **options)
        assert not plan(config, batch_size=batch_size, context_length=longest + 1, **options).fits


def test_not_even_one() -> None:
    config = build_config("llama")
    made = plan(config, method="shadowkv", context_length=300, gpu_memory=100, **ZONES)
    assert (made.fits, made.largest_batch_size, made.largest_context_length) == (False, 0, 0)
    assert "not even one" in made.reason


def test_growing_token_by_token_ends_the_same() -> None:
    """But for the page table, which is doubled as it grows, so that it is seldom copied."""
    config = build_config("llama")
    options: dict[str, Any] = dict(method="shadowkv", **ZONES)
    tight = plan(config, context_length=600, batch_size=2, **options).smallest_gpu_memory
    made = plan(config, context_length=600, batch_size=2, gpu_memory=tight, **options)
    cache = SpinCache(config, gpu_memory=tight, **options)
    for count in (250, 250, 99, 1):
        add(cache, config, 2, count)
    stats = cache.stats()
    assert (stats.gpu_bytes, stats.cpu_bytes) == (made.gpu_bytes, made.cpu_bytes)
    assert made.metadata["page_slot"] <= stats.metadata["page_slot"] <= 2 * made.metadata["page_slot"]
    assert stats.metadata["slot_step"] == made.metadata["slot_step"]


def test_models_and_their_dtype() -> None:
    model, config = subject_model("llama"), build_config("llama")
    made = plan(model, context_length=100)
    assert made == plan(config, context_length=100, dtype=torch.float32)
    assert made != plan(config, context_length=100, dtype=torch.float16)
    config.dtype = torch.float16
    assert plan(config, context_length=100) == plan(config, context_length=100, dtype=torch.float16)


@pytest.mark.parametrize(("family", "size"), [("llama", 512), ("llama", None), ("gpt_oss", 256), ("qwen3_next", 512)])
def test_mean_keys_of_sparse_prompts(family: str, size: int | None) -> None:
    """Planned are the bytes that a prompt takes: for all layers if it is read in chunks, else for one at a time."""
    model, batch = build_model(family), dict(batch_size=2, context_length=1500)
    made = {
        prefill: plan(model, **batch, prefill=prefill, prefill_chunk_size=size)  # type: ignore[arg-type]
        for prefill in ("dense", "sparse")
    }
    cache = SpinCache(model, prefill="sparse", prefill_chunk_size=size)
    held: list[int] = []
    original = sparse_prompt._key_means

    def noting(state: Any, layer: Any, *rest: Any) -> torch.Tensor:
        means = original(state, layer, *rest)
        others = [each.key_means[0] for each in state.layers if each is not layer and each.key_means is not None]
        held.append(means.nbytes + sum(each.nbytes for each in others))
        return means

    with mock.patch.object(sparse_prompt, "_key_means", noting), torch.no_grad():
        model(random_tokens(2, 1500), past_key_values=cache)
    assert made["sparse"].prefill_bytes - made["dense"].prefill_bytes == max(held) > 0
    assert replace(made["sparse"], prefill_bytes=0) == replace(made["dense"], prefill_bytes=0)


def test_mean_keys_are_a_32nd_of_the_pages() -> None:
    shape = LayerShape(8, 128, 128)
    pages = 2 * 8 * 128 * 2 * 131072
    assert key_means_bytes([shape] * 32, 2, 1, 131072) == 32 * pages // 32
    assert key_means_bytes([shape], 2, 3, 17) == 3 * 2 * 8 * 128 * 2


def test_chunks_leave_room_for_mean_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk is smaller by what mean keys take."""
    monkeypatch.setattr(prefill_peak, "free_gpu_memory", lambda _: 8 << 30)
    config, gpu = build_config("llama"), forward_of(SpinCache(build_config("llama"))).gpu
    device = torch.device("cpu")
    room = 2 * gpu.watermarks.margin(gpu.held(device) + (8 << 30)) - 4 * gpu.tuning.piece_bytes
    assert room > 0
    each = prefill_peak.bytes_per_token(config, 2)
    sizes = [prefill_peak.chunk_tokens(config, 2, gpu, [device], means) for means in (0, room - 1000 * each, room)]
    assert sizes[0] > sizes[1] == 512
    assert sizes[2] == 256


def test_pieces_of_earlier_tokens_are_smaller_on_a_small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take half of what is left free for prompts, so that chunks get the other half."""
    config, gpu, free = build_config("llama"), forward_of(SpinCache(build_config("llama"))).gpu, 16 << 20
    assert prefill_peak.piece_bytes(gpu.tuning, None) == prefill_peak.piece_bytes(gpu.tuning, 8 << 30) == 128 << 20
    margin = gpu.watermarks.margin(free)
    assert prefill_peak.piece_bytes(gpu.tuning, free) == margin // 4
    monkeypatch.setattr(prefill_peak, "free_gpu_memory", lambda _: free)
    fitting = margin // prefill_peak.bytes_per_token(config, 2)
    assert 256 < fitting // 2 < prefill_peak.chunk_tokens(config, 2, gpu, [torch.device("cpu")]) <= fitting
    cache = fill(config, 1, 40)
    assert cache.paged_layers[0].store is not None
    assert cache.paged_layers[0].store.piece_bytes == margin // 4


def test_nothing_is_paged() -> None:
    made = plan(build_config("mistral"), context_length=100, gpu_memory=1)
    assert (made.fits, made.gpu_bytes, made.metadata_bytes, made.paged_layers) == (True, 0, 0, 0)
    assert "no layer" in made.reason


def test_wrong_arguments() -> None:
    config = build_config("llama")
    for error, words, arguments in (
        (OptionError, "batch_size", dict(batch_size=0)),
        (OptionTypeError, "context_length", dict(context_length=1.5)),
        (OptionTypeError, "dtype", dict(dtype="int3")),
        (OptionError, "unknown method", dict(method="none")),
        (OptionError, "gpu_memory", dict(gpu_memory=0)),
        (TypeError, "bugdet", dict(bugdet=1)),
        (OptionError, "prefill: expected", dict(prefill="sprase")),
        (OptionError, "prefill_top_p", dict(prefill_top_p=0.0)),
    ):
        with pytest.raises(error, match=words):
            plan(config, **(dict(context_length=10) | arguments))
    with pytest.raises(OptionTypeError, match="model"):
        plan("a path", context_length=10)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError):
        plan(T5Config(), context_length=10)


def test_it_prints_as_a_table() -> None:
    config = build_config("gemma3_text")
    text = str(plan(config, method="shadowkv", context_length=1000, gpu_memory="1MiB"))
    assert text.startswith("MemoryPlan\n  batch size")
    for line in ("fits", "KiB", "summaries", "largest context length", "2 (sliding window: only the window is kept)"):
        assert line in text
    stats = str(fill(config, 2, 300, method="shadowkv").stats())
    assert "metadata bytes    64 B\n  metadata          directory 32 B, reference counts 32 B\n" in stats


PAGED = [name for name, family in FAMILIES.items() if family.paged]


@pytest.mark.parametrize("family", PAGED)
def test_the_config_tells_the_shapes(family: str) -> None:
    """What the config predicts is what comes, in every family."""
    model = subject_model(family)
    cache = SpinCache(model)
    with torch.no_grad():
        model(random_tokens(1, 9), past_key_values=cache)
    layers = cache.paged_layers
    shapes = layer_shapes(decoder_config(model)[0], [layer.layer_idx for layer in layers])
    assert shapes is not None
    for layer, shape in zip(layers, shapes, strict=True):
        store = layer.store
        assert store is not None
        assert (shape.num_heads, shape.key_dim, shape.value_dim) == (store.num_heads, store.key_dim, store.value_dim)


REAL = dict(vocab_size=32, hidden_size=1024, intermediate_size=8, num_hidden_layers=2, num_attention_heads=8,
            num_key_value_heads=2, head_dim=128)  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("capped", [False, True])
def test_metadata_is_a_hundredth_and_grows_with_the_tokens_held(method: str, capped: bool) -> None:
    """With heads of 128 in 16 bits as real models have. Twice the tokens take twice the bytes, whatever the longest context.

    Where a method clusters tokens, their original places take 0.4 % of the keys and values. All else is below 0.5 %; for pages
    of 4 tokens, which need twice as many numbers, below 0.515 %.
    """
    seen = []
    for maximum in (2048, 1 << 20):
        config = LlamaConfig(**REAL, max_position_embeddings=maximum, dtype=torch.bfloat16)
        for length in (2048, 4096):
            options: dict[str, Any] = dict(method=method, budget=64)
            if capped:
                whole = plan(config, context_length=length, **options)
                options["gpu_memory"] = (whole.smallest_gpu_memory + whole.gpu_bytes) // 2
            cache = fill(config, 1, length - 1, torch.bfloat16, **options)
            add(cache, config, 1, 1, torch.bfloat16)  # methods that cluster do it now
            stats = cache.stats()
            assert bool(stats.metadata["spans"]) == (method in ("bisection", "retroinfer", "fitted"))
            keys_and_values = 2 * 2 * length * 256 * 2
            assert (stats.cpu_bytes > 0) == capped
            shifts, fits = stats.metadata.get("clustered shifts", 0), stats.metadata["fitted tensors"]
            assert fits == (
                2 * 2 * (3 * 128 * 128 * 2 + 4 * 128 * 4) if method == "fitted" else 0
            )  # whatever the length
            assert (
                stats.metadata_bytes - shifts - fits
                <= (0.00515 if method in ("bisection", "fitted") else 0.005) * keys_and_values
            )
            assert stats.metadata_bytes - fits <= 0.01 * keys_and_values
            assert shifts <= 0.004 * keys_and_values  # 2 bytes a token, of 512
            seen.append(stats.metadata_bytes - fits)
    assert seen[:2] == seen[2:]
    assert 1.8 * seen[0] <= seen[1] <= 2.2 * seen[0]
