"""The rival with keys in two bits: its code, and which tokens it selects."""

from __future__ import annotations

import pytest
import torch

from benchmarks.quality.two_bit_keys import LEVELS, TwoBitKeys, hadamard, in_two_bits
from spin_hf import SpinCache
from tests.support.tiny_llama import tiny_llama


@pytest.mark.parametrize("size", [1, 2, 64])
def test_the_rotation_is_its_own_inverse(size: int) -> None:
    matrix = hadamard(size)
    assert torch.allclose(matrix @ matrix, torch.eye(size), atol=1e-6)
    assert torch.allclose(matrix.abs(), torch.full((size, size), size**-0.5))


def test_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="expected heads of a power of two, got 48"):
        hadamard(48)


def test_the_error_is_that_of_four_levels() -> None:
    """0.1175 of the variance is the least that four levels give for a normal distribution."""
    keys = torch.randn((2000, 64), generator=torch.Generator().manual_seed(0))
    error = (in_two_bits(keys) - keys).square().mean() / keys.square().mean()
    assert 0.10 < float(error) < 0.125


def test_a_key_has_four_levels() -> None:
    keys = torch.randn((5, 64), generator=torch.Generator().manual_seed(1)) * 7
    rotated = in_two_bits(keys) @ hadamard(64)
    scale = keys.square().mean(-1, keepdim=True).sqrt()
    levels = torch.tensor([-LEVELS[1], -LEVELS[0], *LEVELS])
    assert float((rotated / scale - levels[:, None, None]).abs().amin(0).max()) < 1e-4


def test_a_cache_selects_single_tokens() -> None:
    model = tiny_llama()
    ids = torch.randint(3, 60, (1, 80), generator=torch.Generator().manual_seed(2))
    cache = SpinCache(model, TwoBitKeys(), budget=9, num_sink_tokens=2, recent_window=5, summary_dtype="model")
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
    assert cache.stats().attended_tokens == 2 + 9 + 5
