"""The cache on a CUDA GPU: exact against DynamicCache with and without paging, the same selection as on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from spin_hf import SpinCache
from tests.support.zoo import PAD_TOKEN_ID, build_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

FAMILIES = ["llama", "gemma3_text", "gpt_oss", "qwen3_next", "deepseek_v3"]
TIGHT = 120_000  # bytes: fewer page frames than the prompts below have pages


def _inputs(device: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 100, (2, 90), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :11], mask[0, :11] = PAD_TOKEN_ID, 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _generate(model: PreTrainedModel, cache: Any, **options: Any) -> Any:
    return model.generate(
        **_inputs(str(model.device)), past_key_values=cache, max_new_tokens=24, do_sample=False,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip


def _worst(ours: Any, theirs: Any) -> float:
    a, b = torch.stack(ours.logits), torch.stack(theirs.logits)
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_full_budget_equals_dynamic_cache(family: str, beams: int) -> None:
    model = build_model(family).cuda().eval()
    expected = _generate(model, DynamicCache(config=model.config), num_beams=beams)
    cache = SpinCache(model, "shadowkv", budget=1 << 20)
    actual = _generate(model, cache, num_beams=beams)
    assert torch.equal(actual.sequences, expected.sequences)
    assert _worst(actual, expected) < 1e-4
    cache.check_integrity()


def test_full_budget_equals_dynamic_cache_while_paging() -> None:
    model = build_model("llama").cuda().eval()
    expected = _generate(model, DynamicCache(config=model.config))
    cache = SpinCache(model, "shadowkv", budget=1 << 20, recent_window=8, gpu_memory=TIGHT)
    actual = _generate(model, cache)
    assert torch.equal(actual.sequences, expected.sequences)
    assert _worst(actual, expected) < 1e-4
    stats = cache.stats()
    assert stats.loads > 0  # nothing is evicted: what finds no slot among the step's own pages is read where it is
    assert stats.cpu_bytes > 0
    assert stats.gpu_bytes <= TIGHT
    cache.check_integrity()


@pytest.mark.parametrize("gpu_memory", ["auto", TIGHT])
def test_selects_what_the_cpu_selects(gpu_memory: int | str) -> None:
    options: dict[str, Any] = {"method": "shadowkv", "budget": 24, "recent_window": 8}
    model = build_model("llama").eval()
    expected = _generate(model, SpinCache(model, **options))
    cache = SpinCache(model, **options, gpu_memory=gpu_memory)
    actual = _generate(model.cuda(), cache)
    assert torch.equal(actual.sequences.cpu(), expected.sequences)
    assert cache.stats().attended_tokens < 60
    cache.check_integrity()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = build_model("llama").cuda().to(dtype).eval()
    cache = SpinCache(model, "shadowkv", budget=24, recent_window=8, gpu_memory=TIGHT // 2)
    output = _generate(model, cache)
    assert bool(torch.isfinite(torch.stack(output.logits)).all())
    assert output.sequences.shape == (2, 114)
    cache.check_integrity()
