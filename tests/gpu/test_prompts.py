"""Prompts on a GPU: fused attention with its log-sum-exp, streams from host memory, and whole models in chunks."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from spin_hf import SpinCache
from spin_hf.backends import dense
from spin_hf.kernels import fused_attention
from spin_hf.storage.page_stream import TokenStream
from tests.support.cache_driver import CacheDriver, RandomKV, Shape
from tests.support.tuning import tune
from tests.support.zoo import PAD_TOKEN_ID, build_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

BACKENDS = {
    "default": None, "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH,
}  # fmt: skip


def in_float64(query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp by the formulas."""
    scores = torch.einsum("bhgqd,bhmd->bhgqm", query.double(), keys.double()) * scale
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(
            scores.shape[4] - scores.shape[3]
        )
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("bhgqm,bhmd->bhgqd", scores.softmax(-1), values.double()), scores.logsumexp(-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "sizes",
    [(64, 64, 128), (513, 513, 128), (200, 1700, 64), (256, 4096, 128), (33, 700, 80), (1, 300, 128), (40, 90, 12)],
)
@pytest.mark.parametrize("causal", [True, False])
def test_fused_attention(causal: bool, sizes: tuple[int, int, int], dtype: torch.dtype, backend: str) -> None:
    queries, tokens, dim = sizes
    generator = torch.Generator("cuda").manual_seed(0)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.float32).to(dtype)

    query, keys, values = (
        new(2, queries, 2, 4, dim).permute(0, 2, 3, 1, 4),
        new(2, 2, tokens, dim),
        new(2, 2, tokens, dim),
    )
    chosen = BACKENDS[backend]
    allowed = [chosen, SDPBackend.MATH] if chosen is not None else list(filter(None, BACKENDS.values()))
    with sdpa_kernel(allowed):
        out, lse = fused_attention(query, keys, values, 0.2, causal)
    wanted, wanted_lse = in_float64(query, keys, values, 0.2, causal)
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-3  # TF32 may be allowed
    assert float((out.double() - wanted).abs().max()) <= 4 * rounding * float(values.abs().max())
    assert float((lse.double() - wanted_lse).abs().max()) <= 1e-2


@pytest.mark.parametrize("cpu_dtype", ["auto", "int8"])
@pytest.mark.parametrize("segments", [1, 3, 64])
def test_a_stream_from_host_memory(segments: int, cpu_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads on another stream, while the compute stream is busy, give what the pages hold."""
    shape = Shape(layers=1, kv_heads=4, group=2, key_dim=64, value_dim=64)
    tune(monkeypatch, max_chunk_segments=3, min_chunk_segments=1)
    kv = RandomKV.random(shape, 2, 5000, seed=0).to("cuda", torch.bfloat16)
    driver = CacheDriver(shape, budget=64, recent_window=16, gpu_memory="2MB", cpu_dtype=cpu_dtype)
    driver.steps(kv, 0, [3000, 5000])
    store = driver.cache.paged_layers[0].store
    assert store is not None
    assert store.is_registered
    store.piece_bytes = segments * 2 * 32 * 4 * store.layout.row_bytes
    busy = torch.randn(4096, 4096, device="cuda")
    for stop in (1, 700, 4999):
        keys, values = [], []
        with TokenStream(store, stop) as stream:
            for _, some_keys, some_values in stream:
                busy = busy @ busy  # the piece is read late
                keys.append(some_keys.clone())
                values.append(some_values.clone())
        wanted = store.held(stop)
        assert torch.equal(torch.cat(keys, 2), wanted[0])
        assert torch.equal(torch.cat(values, 2), wanted[1])


def test_a_question_behind_a_long_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few queries attend to earlier and new tokens in one call of flash; the same in pieces. Memory is that of one copy."""
    shape = Shape(layers=2, kv_heads=4, group=2, key_dim=64, value_dim=64)
    kv = RandomKV.random(shape, 1, 20064, seed=0).to("cuda", torch.bfloat16)
    found, calls, fused = [], [], importlib.import_module("spin_hf.kernels.fused_attention")
    flash = fused._flash
    monkeypatch.setattr(fused, "_flash", lambda *args: calls.append(args[1].shape[2]) or flash(*args))
    for in_pieces in (False, True):
        if in_pieces:
            monkeypatch.setattr(dense, "_whole", lambda call, store: None)
        driver = CacheDriver(shape, budget=64, recent_window=16)
        driver.step(kv, 0, 20000)
        driver.step(kv, 20000, 20032)
        calls.clear()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found.append(driver.step(kv, 20032, 20064))
        if not in_pieces:
            assert calls == [20064, 20064]
            assert torch.cuda.max_memory_allocated() - before < 1.5 * 20064 * 4 * 128 * 2
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2)


TIGHT = {"gpu_memory": 120_000}
CASES = [
    *((family, {}) for family in ("llama", "gemma3_text", "gpt_oss", "qwen3_next", "gemma2")),
    *((family, options) for family in ("llama", "gpt_oss") for options in (TIGHT, TIGHT | {"cpu_dtype": "int8"})),
]


@pytest.mark.parametrize(("family", "options"), CASES, ids=str)
def test_chunks(family: str, options: dict[str, Any]) -> None:
    """A padded prompt in chunks of 13, and what is generated behind it."""
    model = build_model(family).cuda().eval()
    ids = torch.randint(3, 100, (2, 190), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :31], mask[0, :31] = PAD_TOKEN_ID, 0
    given: dict[str, Any] = dict(
        attention_mask=mask.cuda(), max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    expected = model.generate(ids.cuda(), past_key_values=DynamicCache(config=model.config), **given)
    cache = SpinCache(model, "shadowkv", budget=1 << 20, recent_window=8, prefill_chunk_size=13, **options)
    actual = model.generate(ids.cuda(), past_key_values=cache, **given)
    ours, theirs = torch.stack(actual.logits), torch.stack(expected.logits)
    exact = "cpu_dtype" not in options
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < (1e-4 if exact else 0.2)
    assert torch.equal(actual.sequences, expected.sequences) or not exact
    cache.check_integrity()
    assert bool(cache.stats().cpu_bytes) == bool(options)


def test_memory_of_a_prompt() -> None:
    """No mask of queries by tokens, and activations of one chunk."""
    model = build_model("llama").cuda().eval()
    ids = torch.randint(3, 100, (1, 60_000)).cuda()
    peaks = []
    for size in (512, None):
        cache = SpinCache(model, "shadowkv", prefill_chunk_size=size)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            model(ids, past_key_values=cache, logits_to_keep=1)
        peaks.append(torch.cuda.max_memory_allocated() - cache.stats().gpu_bytes)
        del cache
    assert peaks[0] < 60_000 * 60_000 // 8
    assert peaks[0] < peaks[1]
