"""GPU memory by the counters of the allocator: caps that hold, "auto" that shares memory, and memory that is released."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from spin_hf import SpinCache
from spin_hf.config import Tuning
from spin_hf.memory import watermarks
from tests.support.tuning import tune, tuned

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

CONFIG = LlamaConfig(
    vocab_size=128, hidden_size=256, intermediate_size=256, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=4, head_dim=128,
)  # fmt: skip
TOKEN_BYTES = 4 * 4 * 2 * 128 * 2
"""Of keys and values of a token."""


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    with torch.device("cuda"):
        return LlamaForCausalLM(CONFIG).to(torch.bfloat16).eval()


@torch.no_grad()
def read(
    model: Any, cache: SpinCache, batch_size: int, tokens: int, seed: int = 0, piece_tokens: int = 4096
) -> torch.Tensor:
    """The last logits; a long prompt is read in pieces, as its activations would take more than its keys and values."""
    ids = torch.randint(0, 128, (batch_size, tokens), generator=torch.Generator().manual_seed(seed)).cuda()
    for piece in ids.split(piece_tokens, 1):
        logits = model(piece, past_key_values=cache, logits_to_keep=1).logits
    return logits


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("cap", ["256MiB", "512MiB"])
def test_a_cap_is_kept(model: Any, cap: str) -> None:
    """Within 2 %, through a prompt, decode steps, growth, and another batch."""
    most = int(cap[:-3]) << 20
    cache = SpinCache(model.config, "shadowkv", budget=512, gpu_memory=cap)
    for count in (5000, 1, 900, 1):  # what the model and its kernels themselves keep
        read(model, cache, 1, count)
    cache.batch_repeat_interleave(2)
    read(model, cache, 2, 1)
    del cache
    before = allocated()
    cache = SpinCache(model.config, "shadowkv", budget=512, gpu_memory=cap)
    for count in (2 * most // TOKEN_BYTES, 1, 1, 900, 1, 1, 3000, 1):
        read(model, cache, 1, count)
        assert allocated() - before <= 1.02 * most
    assert cache.stats().cpu_bytes > most
    cache.batch_repeat_interleave(2)
    read(model, cache, 2, 1)
    assert allocated() - before <= 1.02 * most
    cache.check_integrity()


@torch.no_grad()
def test_a_padded_batch_has_shares_by_length(model: Any) -> None:
    """Page frames in proportion to real tokens; answers are those of a cache that pages nothing."""
    length, steps = 6000, 8
    ids = torch.randint(0, 128, (3, length + steps), generator=torch.Generator().manual_seed(3)).cuda()
    mask = torch.ones_like(ids)
    mask[0, :4500], mask[1, :2500] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = []
    for cap in ("24MiB", "auto"):
        cache, outputs, stop = SpinCache(model, "shadowkv", budget=512, gpu_memory=cap), [], 0
        for count in (length, *[1] * steps):
            start, stop = stop, stop + count
            out = model(
                ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions[:, start:stop],
                past_key_values=cache, logits_to_keep=1,
            )  # fmt: skip
            outputs.append(out.logits)
        cache.check_integrity()
        logits.append(torch.cat(outputs, 1))
        if cap != "auto":
            (short, middle, long) = cache.paged_layers[0].store.frames.slots
            assert short < middle < long
            assert cache.stats().evictions + cache.stats().loads > 0
    torch.testing.assert_close(*logits, rtol=0, atol=0.05)


def test_what_is_released_can_be_allocated(model: Any) -> None:
    """By captured steps, whose tokens are those of a cache that was left alone."""
    tokens = []
    for disturbed in (False, True):
        with tuned(check_interval_steps=2):  # frames come back between two releases
            cache = SpinCache(model, "shadowkv", budget=512, gpu_memory="256MiB")
        read(model, cache, 1, 40_000)
        out = [read(model, cache, 1, 1, seed) for seed in range(6)]
        for seed in range(6, 12):
            if disturbed:
                held = allocated()
                given = cache.release_gpu_memory("64MiB" if seed % 2 else None)
                assert given > 0 or seed > 6
                assert held - allocated() >= 0.98 * given - (1 << 20)  # a block of the allocator
            out.append(read(model, cache, 1, 1, seed))
        cache.check_integrity()
        tokens.append(torch.cat(out, 1))
    torch.testing.assert_close(*tokens, rtol=0, atol=0.05)


def test_auto_leaves_a_margin_and_gives_back(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that seems to have 400 MiB more than now, until others take all but 4 MiB of it.

    Prompts come in pieces: masks of 4,096 tokens over the full context would not fit.
    """
    read(model, SpinCache(model, "shadowkv", budget=512), 1, 3000)  # what the model itself keeps
    torch.cuda.empty_cache()
    end = allocated() + (400 << 20)
    tune(monkeypatch, margin_bytes=0)
    monkeypatch.setattr(watermarks, "free_gpu_memory", lambda device: max(0, end - torch.cuda.memory_allocated()))
    first = SpinCache(model, "shadowkv", budget=512)
    read(model, first, 1, 60_000, piece_tokens=256)
    for seed in range(3):
        read(model, first, 1, 1, seed)
    frames = first.stats().buffer_frames
    assert 0 < (end - allocated()) <= 80 << 20
    whole, end = end, allocated() + (4 << 20)
    for seed in range(Tuning().check_interval_steps + 1):
        read(model, first, 1, 1, seed)
    assert first.stats().buffer_frames < frames
    assert end - allocated() > 16 << 20
    end = whole
    for seed in range(Tuning().check_interval_steps + 1):
        read(model, first, 1, 1, seed)
    frames = first.stats().buffer_frames
    second = SpinCache(model, "shadowkv", budget=512)
    read(model, second, 1, 60_000, piece_tokens=256)
    read(model, second, 1, 1)
    assert first.stats().buffer_frames < frames
    assert second.stats().buffer_frames > 0
    assert end - allocated() > 0
    for seed in range(3):
        read(model, first, 1, 1, seed)
        read(model, second, 1, 1, seed)
    for cache in (first, second):
        cache.check_integrity()


def test_out_of_memory_is_answered_by_releasing(model: Any) -> None:
    """The remedy of the documentation."""
    cache = SpinCache(model, "shadowkv", budget=512)
    read(model, cache, 1, 120_000)
    assert cache.stats().cpu_bytes == 0
    held, total = allocated(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((held + (64 << 20)) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(700 << 20, dtype=torch.uint8, device="cuda")
        assert cache.release_gpu_memory("700MiB") >= 700 << 20
        taken = [torch.empty(20 << 20, dtype=torch.uint8, device="cuda") for _ in range(25)]  # between what stays
        read(model, cache, 1, 1)
        del taken
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert cache.stats().cpu_bytes > 0
    cache.check_integrity()


def test_a_long_prompt_on_a_small_gpu() -> None:
    """1 GiB of keys and values where torch may take 512 MiB beside the weights, with default arguments.

    A prompt and what follows it stay within that: chunks, page frames, clusters and summaries. Logits are `DynamicCache`'s.
    """
    tokens, room = 65536, 512 << 20
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=1024, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=2 * tokens,
    )  # fmt: skip
    with torch.device("cuda"):
        wide = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    ids = torch.randint(0, 128, (1, tokens), generator=torch.Generator().manual_seed(1)).cuda()
    options: dict[str, Any] = dict(do_sample=False, eos_token_id=None, return_dict_in_generate=True, output_logits=True)
    mask = torch.ones_like(ids)
    expected = wide.generate(
        ids, attention_mask=mask, past_key_values=DynamicCache(config=config), max_new_tokens=1,
        prefill_chunk_size=8192, **options,
    ).logits[0]  # fmt: skip
    wide.generate(ids[:, :9000], attention_mask=mask[:, :9000], past_key_values=SpinCache(wide), max_new_tokens=4)
    total = torch.cuda.get_device_properties(0).total_memory
    weights = allocated()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / total)
    try:
        cache = SpinCache(wide)
        out = wide.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=16, **options)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(out.logits) == 16
    stats = cache.stats()
    assert stats.cpu_bytes >= 1 << 30
    assert stats.buffer_frames > 0
    assert torch.cuda.max_memory_allocated() - weights <= room
    torch.testing.assert_close(out.logits[0], expected, rtol=0, atol=0.05)
    cache.check_integrity()
