"""The Triton kernels, interpreted on the CPU, against the reference path: same tokens, same logits, same selection."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch

import spin_hf.kernels
from spin_hf import ShadowKV, SpinCache, decode

from ..support.zoo import PAD_TOKEN_ID, build_model

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu runs the kernels themselves"),
]

TIGHT = 60_000  # bytes: fewer page frames than the prompt below has pages
STEPS = 3


def _inputs(padding: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 100, (2, 61), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding == "left":
        ids[0, :11], mask[0, :11] = PAD_TOKEN_ID, 0
    elif padding == "holes":  # few tokens on many pages
        mask[0, :-1] = 0
        mask[0, ::7] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _run(model: Any, padding: str, **options: Any) -> tuple[Any, SpinCache]:
    cache = SpinCache(model, **{"recent_window": 8, **options})
    output = model.generate(
        **_inputs(padding), past_key_values=cache, max_new_tokens=STEPS, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return output, cache


@pytest.mark.parametrize(
    ("family", "padding", "options"),
    [
        ("llama", "none", {"budget": 24}),
        ("llama", "left", {"budget": 24}),
        ("llama", "left", {"budget": 0.3}),
        ("llama", "holes", {"budget": 16, "recent_window": 1, "num_sink_tokens": 1}),
        ("llama", "none", {"budget": 16, "method": ShadowKV(outlier_pages_per_1024=0)}),
        ("llama", "none", {"budget": 24, "gpu_memory": TIGHT}),
        ("llama", "left", {"budget": 1 << 20, "gpu_memory": TIGHT}),
        ("gpt_oss", "none", {"budget": 16}),  # attention sinks; outliers of positive cosine
        ("gemma3_text", "none", {"budget": 16}),
    ],
)
def test_kernels_do_what_the_reference_does(
    family: str, padding: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(family).eval()
    expected, reference = _run(model, padding, **options)
    reference.check_integrity()
    counted = reference.stats()
    del reference
    from spin_hf.kernels.launch import launchers as interpreted

    launched = []
    monkeypatch.setattr(spin_hf.kernels, "launchers", lambda device: launched.append(device) or interpreted)
    monkeypatch.setattr(decode, "_PROGRAMS", 8)
    actual, cache = _run(model, padding, **options)
    assert launched
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), rtol=0, atol=1e-4)
    stats = cache.stats()
    cache.check_integrity()
    if counted.sparse_queries:
        assert stats.sparse_queries == counted.sparse_queries
        assert stats.attended_tokens == counted.attended_tokens
    if "gpu_memory" in options:
        assert stats.loads > 0
        assert stats.gpu_bytes <= TIGHT
