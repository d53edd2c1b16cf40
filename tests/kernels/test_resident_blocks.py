"""Sparse attention of prompts on pages where they are: the interpreted kernel against masked attention over all tokens."""

from __future__ import annotations

import math
import os
import sys
from typing import Any

import pytest
import torch

from spin_hf.kernels import ResidentPages
from spin_hf.kernels.reference import attend, merge_into
from spin_hf.kernels.reference_blocks import BlockLists, choose_blocks
from tests.support.blocks_of_prompts import SHAPES, in_pages, means_of, states

INTERPRETED = pytest.mark.skipif(
    sys.platform != "linux" or os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu runs the kernels themselves"
)


@pytest.mark.parametrize(("page_size", "segment", "whole"), [
    (4, 32, True), (8, 32, True), (128, 32, True), (1, 32, False), (6, 32, False), (256, 32, False), (16, 4, False),
])  # fmt: skip
def test_which_pages_hold_blocks(page_size: int, segment: int, whole: bool) -> None:
    rows = torch.zeros((1, 1, 8), dtype=torch.int64)
    assert ResidentPages(rows, rows, 8, segment, page_size, 8, 8, torch.float32).holds_blocks_of(128) == whole


@INTERPRETED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("page_size", "sinks", "memory"), [(4, False, 232), (8, True, 48), (32, False, 96)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_to_listed_blocks(
    shape: tuple[int, ...], page_size: int, sinks: bool, memory: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """With tiles of several sizes. Rows that hold no tokens are not numbers."""
    from spin_hf.kernels import device_limits
    from spin_hf.kernels.prompt.attend_resident_blocks import attend_resident_blocks

    monkeypatch.setattr(device_limits, "shared_memory", lambda device: memory << 10)
    query, keys, values = (each.to(dtype) for each in states(shape))
    first, scale, group = shape[3], 1 / math.sqrt(shape[5]), shape[2]
    lists = choose_blocks(*means_of(query.float(), keys.float()), scale, 0.6, first, 1 << 20)
    listed = lists.mask(lists.blocks.shape[3])
    assert not bool(listed.all()) or shape[4] < 128
    undefined = torch.arange(lists.blocks.shape[3]) >= lists.counts.unsqueeze(-1)
    lists = BlockLists(lists.blocks.masked_fill(undefined, 1 << 30), lists.counts, first)
    logits = torch.linspace(-1, 3, shape[1] * group).to(dtype) if sinks else None
    pages, _chunks = in_pages(keys, values, page_size)
    assert pages.holds_blocks_of(128)
    whole = torch.full((shape[0], shape[4], shape[1] * group + 1, shape[6]), 7.0, dtype=dtype)
    out, wanted = whole[:, :, :-1], torch.empty_like(whole[:, :, :-1], dtype=torch.float32)
    num_dense = page_size // 8 % (lists.blocks.shape[2] + 1)
    attend_resident_blocks(query, pages, lists, num_dense, scale, logits, out)
    tokens = torch.arange(keys.shape[2])
    mask = listed.repeat_interleave(128, 3)[..., : keys.shape[2]].repeat_interleave(128, 2)[:, :, : shape[4]]
    mask = mask & (tokens <= tokens[128 * first :].unsqueeze(1))
    partial = attend(*(each.float() for each in (query, keys, values)), mask.unflatten(1, (shape[1], group)), scale)
    merge_into([partial], None if logits is None else logits.float(), wanted)
    tolerance: Any = dict(rtol=1e-3, atol=1e-4) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(out.float(), wanted, **tolerance)
    assert bool((whole[:, :, -1] == 7).all())
