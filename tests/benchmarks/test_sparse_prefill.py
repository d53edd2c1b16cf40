"""Blocks that a sparse prefill reads: what is always read, causality, chunks, and attention over chosen blocks."""

from __future__ import annotations

import pytest
import torch

from benchmarks.quality import block_choice
from benchmarks.quality.choose_blocks import _top_p, choose_blocks
from benchmarks.quality.sparse_prefill import BlockSparse

SCALE = 0.25


def states(queries: int, keys: int, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys that are alike for 64 tokens: means of random ones would all weigh the same."""
    draw = torch.Generator().manual_seed(queries + keys)

    def made(heads: int, tokens: int) -> torch.Tensor:
        slow = torch.randn(batch, heads, tokens // 64 + 1, 16, generator=draw).repeat_interleave(64, 2)[:, :, :tokens]
        return 2 * slow + torch.randn(batch, heads, tokens, 16, generator=draw)

    return made(4, queries), made(2, keys)


def test_all_mass_is_all_causal_blocks() -> None:
    chosen = choose_blocks(*states(512, 1024), top_p=1.1, scale=SCALE)
    assert torch.equal(chosen, block_choice.causal(4, 8).expand(1, 4, -1, -1))


def test_the_heaviest_blocks_are_read_until_their_mass_is_reached() -> None:
    masses = torch.tensor([0.1, 0.05, 0.4, 0.15, 0.3])
    always = torch.tensor([True, False, False, False, False])
    for top_p, others in ((0.09, []), (0.11, [2]), (0.6, [2, 4]), (0.81, [2, 3, 4])):
        assert _top_p(masses, always, top_p).nonzero()[:, 0].tolist() == others


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (300, 300), (130, 901), (256, 1024)])
def test_the_first_block_and_the_diagonal_are_always_read(queries: int, keys: int) -> None:
    chosen = choose_blocks(*states(queries, keys), top_p=1e-9, scale=SCALE)
    positions = keys - queries + torch.arange(queries)
    own = torch.zeros(chosen.shape[2:], dtype=torch.bool)
    own[torch.arange(queries) // 128, positions // 128] = True
    own[:, 0] = True
    assert torch.equal(chosen, own.expand_as(chosen))


@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (130, 901), (256, 1024), (5, 700)])
def test_a_block_in_the_future_is_never_chosen(queries: int, keys: int) -> None:
    chosen = choose_blocks(*states(queries, keys), top_p=0.9, scale=SCALE, dense_from=keys - 100)
    last = (keys - queries + 128 * torch.arange(chosen.shape[2]) + 127).clamp(max=keys - 1)
    assert not chosen[..., torch.arange(chosen.shape[3]) * 128 > last[:, None]].any()
    assert chosen[:, :, -1].all()


def test_a_chunk_chooses_as_the_whole_prompt_does() -> None:
    query, keys = states(1024, 1024)
    whole = choose_blocks(query, keys, top_p=0.6, scale=SCALE)
    parts = [
        choose_blocks(query[:, :, start : start + 256], keys[:, :, : start + 256], top_p=0.6, scale=SCALE)
        for start in range(0, 1024, 256)
    ]
    padded = [torch.nn.functional.pad(part, (0, 8 - part.shape[3])) for part in parts]
    assert block_choice.always(8, 8).float().mean() < whole.float().mean() < block_choice.causal(8, 8).float().mean()
    assert torch.equal(torch.cat(padded, 2), whole)


def test_padding_is_not_seen_and_the_sinks_are_behind_it() -> None:
    query, keys = states(512, 512, batch=2)
    visible = torch.ones(2, 512, dtype=torch.bool)
    visible[1, :200] = False
    chosen = choose_blocks(query, keys, top_p=0.8, scale=SCALE, visible=visible)
    assert torch.equal(chosen[:1], choose_blocks(query[:1], keys[:1], top_p=0.8, scale=SCALE))
    assert not chosen[1, :, 1:, 0].any()
    assert chosen[1, :, 1:, 1].all()


@pytest.mark.parametrize(("per", "per_kv_head"), [("head", False), ("mean", True)])
def test_the_benchmark_chooses_the_same(per: str, per_kv_head: bool) -> None:
    query, keys = states(512, 1024)
    masses = block_choice.means(16, 16)(*block_choice.scaled(query, keys, SCALE), 512)
    expected = block_choice.choose(block_choice.combine(masses, per), "top-p", 0.6)
    assert torch.equal(choose_blocks(query, keys, top_p=0.6, scale=SCALE, per_kv_head=per_kv_head)[0], expected)


def test_more_queries_than_keys_are_an_error() -> None:
    query, keys = states(256, 128)
    with pytest.raises(ValueError, match="pass the keys of the chunk"):
        choose_blocks(query, keys, top_p=0.5, scale=SCALE)


@pytest.mark.parametrize("way", sorted(block_choice.WAYS))
def test_masses_are_those_of_a_softmax_over_earlier_blocks(way: str) -> None:
    query, keys = states(256, 1024)
    masses = block_choice.WAYS[way](*block_choice.scaled(query, keys, SCALE), 768)
    assert masses.shape[1:] == (2, 2, 2, 8)
    assert torch.allclose(masses.sum(-1), torch.ones(()), atol=1e-4)
    assert not masses[..., ~block_choice.causal(2, 8)].any()


@pytest.mark.parametrize("per", ["head", "mean"])
def test_attention_over_blocks_is_masked_attention(per: str) -> None:
    query, keys = states(640, 1024)
    values = states(1, 1024)[1]
    attention = BlockSparse()
    attention.cell, attention.parameter, attention.dense_from = ("means-16-16", "top-p", per), 0.6, 896
    out, _ = attention(None, query, keys, values, None, scaling=SCALE)
    chosen = choose_blocks(
        query, keys, top_p=0.6, scale=SCALE, dense_from=896, per_kv_head=per == "mean"
    ).repeat_interleave(2 if per == "mean" else 1, 1)
    allowed = chosen.repeat_interleave(128, 2).repeat_interleave(128, 3)
    allowed = allowed & (torch.arange(1024) <= 384 + torch.arange(640)[:, None])
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=allowed, scale=SCALE, enable_gqa=True
    )
    assert 0 < attention.read < attention.causal
    assert torch.allclose(out.transpose(1, 2), expected, atol=1e-5)
