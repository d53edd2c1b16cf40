"""Sparse prompts on a GPU: the choice and the attention of the kernels against the specification and float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from spin_hf import SpinCache
from spin_hf.kernels import reference_blocks
from tests.support.blocks_of_prompts import in_pages
from tests.support.zoo import build_model, random_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
SHAPES = [
    (1, 8, 4, 12, 2048, 128),
    (2, 2, 3, 3, 700, 80),
    (1, 1, 1, 20, 130, 64),
    (1, 2, 7, 4, 512, 64),
    (1, 1, 2, 2, 384, 256),
]


def states(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, heads, group, earlier, queries, dim = shape
    generator = torch.Generator().manual_seed(0)
    tokens = 128 * earlier + queries
    topics = torch.randn((tokens // 16 + 1, dim), generator=generator).repeat_interleave(16, 0)[:tokens]
    keys = torch.randn((batch, heads, tokens, dim), generator=generator) + topics
    query = torch.randn((batch, queries, heads, group, dim), generator=generator).permute(0, 2, 3, 1, 4)
    query = query + topics.roll(320, 0)[-queries:]
    values = torch.randn((batch, heads, tokens, dim), generator=generator)
    return tuple(each.to("cuda", dtype) for each in (query, keys, values))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from spin_hf.kernels.prompt import attend_blocks, choose_blocks

    query, keys, values = states(shape, dtype)
    first, scale, start = shape[3], 1 / math.sqrt(shape[5]), 128 * shape[3]
    means = reference_blocks.block_means(query.flatten(1, 2)), reference_blocks.block_means(keys)
    ours = choose_blocks.choose_blocks(*means, scale, 0.7, first, first + 2)
    theirs = reference_blocks.choose_blocks(*means, scale, 0.7, first, first + 2)
    columns = -(-keys.shape[2] // 128)
    differs = (ours.mask(columns) != theirs.mask(columns)).float().mean()
    assert float(differs) <= 0.005  # blocks whose masses are equal but for rounding
    assert 2 <= float(theirs.counts.float().mean()) < columns
    for piece, block, causal in [(slice(start, None), first, True), (slice(0, start), 0, False)]:
        k, v = keys[:, :, piece], values[:, :, piece]
        out, lse = attend_blocks.attend_blocks(query, k, v, theirs, scale, block, causal)
        mask = theirs.mask(block + -(-k.shape[2] // 128))[..., block:].repeat_interleave(128, 3)[..., : k.shape[2]]
        mask = mask.repeat_interleave(128, 2)[:, :, : query.shape[3]].unflatten(1, query.shape[1:3])
        if causal:
            mask = mask & torch.ones(mask.shape[3:], dtype=torch.bool, device="cuda").tril()
        scores = (query.double() @ k.double().unsqueeze(2).mT * scale).masked_fill(~mask, float("-inf"))
        wanted_lse = scores.logsumexp(-1)
        weights = (scores - wanted_lse.masked_fill(wanted_lse.isneginf(), 0).unsqueeze(-1)).exp()
        wanted = weights @ v.double().unsqueeze(2)
        tolerance = 4 * max(torch.finfo(dtype).eps, 3e-6) * float(wanted.abs().max())
        assert float((out.double() - wanted).abs().max()) <= tolerance
        found = wanted_lse.isfinite()
        assert torch.equal(found, lse.isfinite())
        assert float((lse.double() - wanted_lse)[found].abs().max()) <= 1e-3


@pytest.mark.parametrize("page_size", [4, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pages_where_they_are(shape: tuple[int, ...], dtype: torch.dtype, page_size: int) -> None:
    """The kernel that reads pages in place, and the gathered tokens, which are the pages' own."""
    from spin_hf.kernels.prompt import attend_resident_blocks, gather_tokens

    query, keys, values = states(shape, dtype)
    batch, _, group, first, queries, dim = shape
    scale, start = 1 / math.sqrt(dim), 128 * first
    pages, chunks = in_pages(keys.cpu(), values.cpu(), page_size)
    chunks = [chunk.cuda() for chunk in chunks]
    table = torch.tensor([chunk.data_ptr() for chunk in chunks], device="cuda")
    pages = pages._replace(table=table, rows=pages.rows.cuda())
    for tokens in (keys.shape[2], keys.shape[2] - 3):
        gathered = gather_tokens.gather_tokens(pages, tokens)
        assert torch.equal(gathered[0], keys[:, :, :tokens])
        assert torch.equal(gathered[1], values[:, :, :tokens])
    means = reference_blocks.block_means(query.flatten(1, 2)), reference_blocks.block_means(keys)
    dense = first + -(-queries // 128) - 2
    lists = reference_blocks.choose_blocks(*means, scale, 0.7, first, dense)
    sinks = torch.linspace(-1, 3, query.shape[1] * group, device="cuda", dtype=dtype)
    out = torch.full((batch, queries, query.shape[1] * group, dim), float("nan"), dtype=dtype, device="cuda")
    attend_resident_blocks.attend_resident_blocks(query, pages, lists, 2, scale, sinks, out)
    columns = lists.blocks.shape[3]
    mask = lists.mask(columns).repeat_interleave(128, 3)[..., : keys.shape[2]].repeat_interleave(128, 2)[:, :, :queries]
    tokens = torch.arange(keys.shape[2], device="cuda")
    mask = (mask & (tokens <= tokens[start:].unsqueeze(1))).unflatten(1, query.shape[1:3])
    scores = (query.double() @ keys.double().unsqueeze(2).mT * scale).masked_fill(~mask, float("-inf"))
    sink = sinks.double().view(1, -1, group, 1, 1).expand(*scores.shape[:-1], 1)
    weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    wanted = (weights @ values.double().unsqueeze(2)).flatten(1, 2).transpose(1, 2)
    tolerance = 4 * max(torch.finfo(dtype).eps, 3e-6) * float(wanted.abs().max())
    assert float((out.double() - wanted).abs().max()) <= tolerance


@torch.no_grad()
@pytest.mark.parametrize("gpu_memory", ["auto", 400_000])
def test_a_share_of_one_is_dense(gpu_memory: Any) -> None:
    model = build_model("llama").cuda().eval()
    ids, found = random_tokens(2, 2600).cuda(), []
    for prefill in ("sparse", "dense"):
        cache = SpinCache(
            model, "shadowkv", gpu_memory=gpu_memory, prefill=prefill, prefill_top_p=1.0, prefill_chunk_size=640,
            budget=64, recent_window=16,
        )  # fmt: skip
        logits = [model(ids, past_key_values=cache).logits]
        logits += [
            model(token, past_key_values=cache).logits for token in random_tokens(2, 6, seed=1).cuda().split(1, 1)
        ]
        cache.check_integrity()
        found.append(torch.cat(logits, 1))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
