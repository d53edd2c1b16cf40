"""Block-sparse attention of prompts: the reference against loops, and interpreted kernels against the reference."""

from __future__ import annotations

import math
import os
import sys
from typing import Any

import pytest
import torch

from spin_hf.kernels import reference_blocks
from spin_hf.kernels.reference import attend, merge_attention
from spin_hf.kernels.reference_blocks import BlockLists, attend_blocks, block_means, choose_blocks
from tests.support.blocks_of_prompts import SHAPES, means_of, states

INTERPRETED = pytest.mark.skipif(
    sys.platform != "linux" or os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu runs the kernels themselves"
)


def brute_force(
    query: torch.Tensor, keys: torch.Tensor, scale: float, top_p: float, first: int, dense_from: int
) -> torch.Tensor:
    """Chosen blocks by loops: [B, heads, query blocks, key blocks]."""
    batch, heads, num_queries, _ = query.shape
    group, num_keys = heads // keys.shape[1], keys.shape[2]
    columns = -(-num_keys // 128)
    chosen = torch.zeros((batch, heads, -(-num_queries // 128), columns), dtype=torch.bool)
    for b in range(batch):
        for head in range(heads):
            for i in range(chosen.shape[2]):
                own = first + i
                weights = []
                for start in range(128 * i, min(128 * (i + 1), num_queries), 16):
                    mean = query[b, head, start : min(start + 16, num_queries)].mean(0)
                    seen = keys[b, head // group, : 128 * first + start + 16]
                    pages = torch.stack([page.mean(0) for page in seen.split(16)])
                    weight = torch.softmax(pages @ mean * scale, 0)
                    blocks = torch.zeros(columns)
                    for number, each in enumerate(weight.split(8)):
                        blocks[number] = each.sum()
                    weights.append(blocks)
                mass = torch.stack(weights).mean(0)
                always = {0, own} if own < dense_from else set(range(own + 1))
                left = top_p - sum(float(mass[block]) for block in always)
                order = sorted(set(range(own + 1)) - always, key=lambda block: -float(mass[block]))
                for block in order:
                    if left <= 0 or mass[block] <= 0:
                        break
                    always.add(block)
                    left -= float(mass[block])
                chosen[b, head, i, sorted(always)] = True
    return chosen


@pytest.mark.parametrize(("top_p", "dense"), [(0.5, 99), (0.9, 99), (0.6, 1), (1.0, 99)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_choice(shape: tuple[int, ...], top_p: float, dense: int) -> None:
    query, keys, _ = states(shape)
    first, scale = shape[3], 1 / math.sqrt(shape[5])
    lists = choose_blocks(*means_of(query, keys), scale, top_p, first, first + dense)
    expected = brute_force(query.flatten(1, 2), keys, scale, top_p, first, first + dense)
    mask = lists.mask(expected.shape[3])
    if top_p < 1:
        assert torch.equal(mask, expected)
    assert torch.equal(mask.sum(-1), lists.counts)
    assert bool(mask[..., 0].all())
    for listed, count in zip(lists.blocks.flatten(0, 2), lists.counts.flatten(), strict=True):
        assert listed[:count].tolist() == sorted(listed[:count].tolist())


@pytest.mark.parametrize("size", [128, 256, 384])
def test_a_chunk_chooses_as_the_whole_prompt_does(size: int) -> None:
    query, keys, _ = states((1, 2, 2, 0, 1000, 16, 16))
    queries, means = query.flatten(1, 2), block_means(keys)
    whole = choose_blocks(block_means(queries), means, 0.25, 0.6, 0, 6).mask(8)
    parts = []
    for start in range(0, 1000, size):
        stop = min(start + size, 1000)
        rows = block_means(queries[:, :, start:stop])
        parts.append(choose_blocks(rows, block_means(keys[:, :, :stop]), 0.25, 0.6, start // 128, 6).mask(8))
    assert torch.equal(torch.cat(parts, 2), whole)
    assert 4 * (8 + 7) < int(whole.sum()) < 4 * 36


@pytest.mark.parametrize("top_p", [1e-9, 0.6, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_block_of_the_future_is_chosen(shape: tuple[int, ...], top_p: float) -> None:
    """The first block and the query block's own always are, and nothing else where hardly any mass is wanted."""
    query, keys, _ = states(shape)
    first = shape[3]
    mask = choose_blocks(*means_of(query, keys), 0.25, top_p, first, 1 << 20).mask(-(-keys.shape[2] // 128))
    block, own = torch.arange(mask.shape[3]), first + torch.arange(mask.shape[2]).unsqueeze(1)
    always = (block == own) | (block == 0)
    assert not bool(mask[..., block > own].any())
    assert bool(mask[..., always].all())
    if top_p < 0.1:
        assert torch.equal(mask, always.expand_as(mask))


def test_later_tokens_change_no_earlier_choice() -> None:
    query, keys, _ = states((1, 2, 2, 2, 512, 16, 16))
    changed_query, changed_keys = query.clone(), keys.clone()
    changed_query[:, :, :, 256:] += 5
    changed_keys[:, :, 512:] -= 5
    before, after = (
        choose_blocks(*means_of(*given), 0.25, 0.6, 2, 99).mask(6)
        for given in ((query, keys), (changed_query, changed_keys))
    )
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert not torch.equal(before[:, :, 2:], after[:, :, 2:])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_to_the_chosen_blocks(shape: tuple[int, ...]) -> None:
    """Pieces of the keys merge to masked attention over all."""
    query, keys, values = states(shape)
    first, scale, start = shape[3], 1 / math.sqrt(shape[5]), 128 * shape[3]
    lists = choose_blocks(*means_of(query, keys), scale, 0.6, first, 1 << 20)
    parts = [attend_blocks(query, keys[:, :, start:], values[:, :, start:], lists, scale, first, True)]
    for block in range(0, first, 2):
        piece = slice(128 * block, min(128 * (block + 2), start))
        parts.append(attend_blocks(query, keys[:, :, piece], values[:, :, piece], lists, scale, block, False))
    tokens = torch.arange(keys.shape[2])
    mask = lists.mask(-(-keys.shape[2] // 128)).repeat_interleave(128, 3)[..., : keys.shape[2]]
    mask = mask.repeat_interleave(128, 2)[:, :, : query.shape[3]] & (tokens <= tokens[start:].unsqueeze(1))
    wanted = attend(query, keys, values, mask.unflatten(1, query.shape[1:3]), scale)
    for ours, theirs in zip(merge_attention(parts), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_everything_is_read_where_top_p_is_one() -> None:
    query, keys, values = states(SHAPES[0])
    lists = choose_blocks(*means_of(query, keys), 0.1, 1.0, 0, 0)
    out, _ = attend_blocks(query, keys, values, lists, 0.1, 0, True)
    mask = torch.ones((512, 512), dtype=torch.bool).tril()[None, None, None]
    torch.testing.assert_close(out, attend(query, keys, values, mask, 0.1)[0], rtol=1e-4, atol=1e-5)


def test_means_of_a_part_of_a_page() -> None:
    values = torch.randn((2, 37, 3))
    expected = torch.stack([part.mean(1) for part in values.split(16, 1)], 1)
    torch.testing.assert_close(block_means(values), expected)


@INTERPRETED
@pytest.mark.parametrize(("top_p", "dense"), [(0.5, 99), (0.9, 99), (0.6, 1)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_choosing_kernels(shape: tuple[int, ...], top_p: float, dense: int) -> None:
    from spin_hf.kernels.prompt import choose_blocks as kernels

    query, keys, _ = states(shape)
    first, scale = shape[3], 1 / math.sqrt(shape[5])
    given = (*means_of(query, keys), scale, top_p, first, first + dense)
    ours, theirs = kernels.choose_blocks(*given), choose_blocks(*given)
    columns = -(-keys.shape[2] // 128)
    assert torch.equal(ours.counts, theirs.counts)
    assert torch.equal(ours.mask(columns), theirs.mask(columns))


@INTERPRETED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_attending_kernel(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from spin_hf.kernels.prompt import attend_blocks as kernels

    query, keys, values = (each.to(dtype) for each in states(shape))
    first, scale, start = shape[3], 1 / math.sqrt(shape[5]), 128 * shape[3]
    lists = choose_blocks(*means_of(query.float(), keys.float()), scale, 0.6, first, 1 << 20)
    tolerance: Any = dict(rtol=1e-3, atol=1e-4) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
    for piece, block, causal in [(slice(start, None), first, True), (slice(0, start), 0, False)]:
        if keys[:, :, piece].shape[2]:
            given = (query, keys[:, :, piece], values[:, :, piece], lists, scale, block, causal)
            ours, theirs = kernels.attend_blocks(*given), reference_blocks.attend_blocks(*given)
            assert ours[0].dtype == dtype
            torch.testing.assert_close(ours[0].float(), theirs[0].float(), **tolerance)
            torch.testing.assert_close(ours[1], theirs[1], rtol=1e-3, atol=1e-3)


def test_lists_and_masks() -> None:
    lists = BlockLists(torch.tensor([[[[0, 2, 5, 1], [1, 3, 4, 5]]]], dtype=torch.int32), torch.tensor([[[3, 4]]]), 4)
    assert lists.mask(6)[0, 0].int().tolist() == [[1, 0, 1, 0, 0, 1], [0, 1, 0, 1, 1, 1]]
