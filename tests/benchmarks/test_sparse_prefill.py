"""The benchmark of sparse prompts: its ways of choosing blocks, attention over them, and prompts that the package reads."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch

from benchmarks.quality import block_choice
from benchmarks.quality.quality_tables import sparse_prefill_table
from benchmarks.quality.sparse_prefill import BlockSparse, Reader, settings
from spin_hf import kernels
from spin_hf.kernels import reference_blocks
from tests.support.zoo import build_model, random_tokens

SCALE = 0.25
PROMPT = 1536
SPIN_CELL = "spin/top-p/head"


def states(queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys that are alike for 64 tokens: means of random ones would all weigh the same."""
    draw = torch.Generator().manual_seed(queries + keys)

    def made(heads: int, tokens: int) -> torch.Tensor:
        slow = torch.randn(1, heads, tokens // 64 + 1, 16, generator=draw).repeat_interleave(64, 2)[:, :, :tokens]
        return 2 * slow + torch.randn(1, heads, tokens, 16, generator=draw)

    return made(4, queries), made(2, keys)


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(build_model("llama"), chunk=512, last=512)


def test_the_package_chooses_what_the_benchmark_does() -> None:
    query, keys = states(512, 1024)
    masses = block_choice.means(16, 16)(*block_choice.scaled(query, keys, SCALE), 512)
    expected = block_choice.choose(block_choice.combine(masses, "head"), "top-p", 0.6)
    means = [reference_blocks.block_means(each) for each in (query, keys)]
    lists = reference_blocks.choose_blocks(means[0], means[1], SCALE, 0.6, 4, 99)
    assert torch.equal(lists.mask(8)[0], expected)


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
    masses = block_choice.means(16, 16)(*block_choice.scaled(query[:, :, :512], keys[:, :, :896], SCALE), 384)
    chosen = block_choice.choose(block_choice.combine(masses, per), "top-p", 0.6)
    allowed = torch.ones(4, 5, 8, dtype=torch.bool)
    allowed[:, :4, :7] = chosen.repeat_interleave(2 if per == "mean" else 1, 0)
    allowed = allowed.repeat_interleave(128, 1).repeat_interleave(128, 2)
    allowed = allowed & (torch.arange(1024) <= 384 + torch.arange(640)[:, None])
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=allowed, scale=SCALE, enable_gqa=True
    )
    assert (attention.read, attention.causal) == (int(chosen.sum()), chosen.shape[0] * (4 + 5 + 6 + 7))
    assert torch.allclose(out.transpose(1, 2), expected, atol=1e-5)


def test_the_package_reads_a_prompt(reader: Reader) -> None:
    """Its distributions are those of the benchmark's own formula where nothing is left out, and near them elsewhere."""
    ids = random_tokens(1, PROMPT + 8)[0].tolist()

    def found(cell: str | None, parameter: float) -> tuple[torch.Tensor, float]:
        cache, logits, density = reader.read(ids[:PROMPT], cell, parameter)
        return reader.next_tokens(cache, logits, ids[PROMPT:]), density

    dense, _ = found(None, 0.0)
    whole, everything = found(SPIN_CELL, 1.0)
    torch.testing.assert_close(whole, dense, rtol=1e-3, atol=1e-4)
    sparse, density = found(SPIN_CELL, 0.6)
    same, expected = found("means-16-16/top-p/head", 0.6)
    assert everything == 1.0
    assert density == pytest.approx(expected, abs=0.01)
    assert density < 0.95
    torch.testing.assert_close(sparse, same, rtol=1e-2, atol=1e-2)


def test_counting_ends_with_the_prompt(reader: Reader) -> None:
    original = kernels.choose_blocks
    reader.read(random_tokens(1, PROMPT)[0].tolist(), SPIN_CELL, 0.5)
    assert kernels.choose_blocks is original


def test_densities_of_the_package_are_refused(reader: Reader) -> None:
    args: Any = argparse.Namespace(cells=[SPIN_CELL], parameters=None, densities=[0.3])
    with pytest.raises(ValueError, match="expected --parameters"):
        settings(reader, [], args)


def test_the_table_of_the_package() -> None:
    row = {"kl": 0.01, "density": 0.25, "lost_mass": None, "parameter": 0.9, "top1_agrees": 0.97}
    assert sparse_prefill_table({"rows": {f"{SPIN_CELL}, parameter 0.9": row}})[2:] == [
        "| spin | top-p | head | 0.9 | 25.0 % | 0.0100 | 97 % |  |"
    ]
