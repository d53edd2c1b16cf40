"""torch's fused attention against the reference, with its log-sum-exp."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from spin_hf.kernels import fused_attention
from spin_hf.kernels.reference import attend, merge_attention

SHAPES = [
    # batch, KV heads, group, queries, tokens, key dim, value dim
    (2, 2, 3, 5, 5, 16, 16), (1, 3, 1, 33, 33, 64, 64), (2, 2, 3, 5, 9, 5, 5), (1, 2, 4, 1, 30, 64, 32),
    (1, 2, 4, 1, 1, 64, 64), (1, 1, 8, 63, 200, 80, 80),
]  # fmt: skip
TOLERANCE = {torch.float32: 2e-6, torch.float64: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_the_reference(shape: tuple[int, ...], dtype: torch.dtype, softcap: float | None, causal: bool) -> None:
    batch, heads, group, queries, tokens, key_dim, value_dim = shape
    generator = torch.Generator().manual_seed(0)

    def new(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    query, keys = new(batch, heads, queries, group, key_dim).transpose(2, 3), new(batch, heads, tokens, key_dim)
    values = new(batch, tokens, heads, value_dim).transpose(1, 2)
    mask = torch.ones((queries, tokens), dtype=torch.bool)
    mask = (mask.tril(tokens - queries) if causal else mask)[None, None, None]
    out, lse = fused_attention(query, keys, values, 0.3, causal, softcap)
    wanted, wanted_lse = attend(query, keys, values, mask, 0.3, softcap)
    assert out.shape == (batch, heads, group, queries, value_dim)
    torch.testing.assert_close(out.float(), wanted, rtol=0, atol=TOLERANCE[dtype] * float(wanted.abs().max()))
    torch.testing.assert_close(lse, wanted_lse, rtol=0, atol=1e-4)


def test_pieces_merge_to_the_whole() -> None:
    """Attention to earlier tokens in pieces and to the new ones is attention to all of them."""
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn((2, 2, *rest), generator=generator) for rest in ((3, 7, 16), (40, 16), (40, 16)))
    pieces = [slice(0, 16), slice(16, 17), slice(17, 33)]
    partials = [fused_attention(query, keys[:, :, at], values[:, :, at], 0.25, False) for at in pieces]
    partials.append(fused_attention(query, keys[:, :, 33:], values[:, :, 33:], 0.25, True))
    out, lse = merge_attention(partials)
    wanted, wanted_lse = fused_attention(query, keys, values, 0.25, True)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse)


@pytest.mark.parametrize(
    ("shape", "tokens", "causal", "is_small"),
    [((1, 32, 4096), 4096, True, True), ((1, 32, 8192), 8192, True, False), ((1, 8, 256), 131072, False, True),
     ((1, 8, 8192), 8192, False, True), ((1, 8, 8192), 32768, False, False)],
)  # fmt: skip
def test_small_products_are_not_worth_a_shape_of_cudnn(
    shape: tuple[int, ...], tokens: int, causal: bool, is_small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch names cuDNN, prompts of any length and few queries behind many tokens get flash attention."""
    query, keys = (torch.empty((*sizes, 128), device="meta", dtype=torch.bfloat16) for sizes in (shape, (1, 8, tokens)))
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: SDPBackend.CUDNN_ATTENTION.value)
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda *_: True)
    module = importlib.import_module("spin_hf.kernels.fused_attention")
    monkeypatch.setattr(module, "_is_on_gpu", lambda _: True)
    chosen = module._chosen_kernel(query, keys, keys, 0.1, causal)
    assert chosen.__name__ == ("_flash" if is_small else "_cudnn")


@pytest.mark.parametrize("serves", [True, False])
def test_last_queries_are_one_call_of_flash(serves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU its causal mask ends with the last token. Without it earlier and new tokens are attended to apart."""
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn((2, 2, *rest), generator=generator) for rest in ((3, 7, 16), (40, 16), (40, 16)))
    expected = fused_attention(query, keys, values, 0.25, True)
    module, calls = importlib.import_module("spin_hf.kernels.fused_attention"), []

    def flash(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, causal: bool) -> Any:
        calls.append((query.shape[2], keys.shape[2], causal))
        mask = torch.ones((query.shape[2], keys.shape[2]), dtype=torch.bool)
        mask = mask.tril(keys.shape[2] - query.shape[2]) if causal else mask
        keys, values = (states.repeat_interleave(query.shape[1] // keys.shape[1], 1) for states in (keys, values))
        out, lse = attend(query.unsqueeze(2), keys, values, mask[None, None, None], scale)
        return out.squeeze(2), lse.squeeze(2)

    monkeypatch.setattr(module, "_is_on_gpu", lambda _: True)
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda *_: serves)
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: SDPBackend.FLASH_ATTENTION.value)
    monkeypatch.setattr(module, "_flash", flash)
    monkeypatch.setitem(module._WITH_GROUPS, SDPBackend.FLASH_ATTENTION.value, flash)
    monkeypatch.setitem(module._KERNELS, SDPBackend.FLASH_ATTENTION.value, flash)
    found = fused_attention(query, keys, values, 0.25, True)
    assert calls == ([(7, 40, True)] if serves else [(21, 33, False), (7, 7, True)])
    torch.testing.assert_close(found, expected)
