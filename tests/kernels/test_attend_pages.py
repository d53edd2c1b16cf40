"""Attention of the decode path against softmax in float64 by loops, with NaN in all memory that must not matter."""

from __future__ import annotations

import math

import pytest
import torch

from spin_hf.kernels import reference
from spin_hf.kernels.reference import apply_attention_sinks, attend, dense_attention, merge_attention

SHAPES = [(1, 1, 1, 1, 1, 4, 4), (2, 3, 2, 1, 63, 8, 5), (1, 2, 4, 7, 65, 3, 8), (3, 1, 1, 16, 8, 16, 16)]
"""B, H, G, Q, M, Dk, Dv."""


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    b, h, g, q, m, dk, dv = shape
    return (
        (torch.randn(b, h, g, q, dk) * 2).to(dtype),
        torch.randn(b, h, m, dk).to(dtype),
        torch.randn(b, h, m, dv).to(dtype),
    )


def brute_force(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
    logit_correction: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) in float64, one query at a time; a token counts where `mask` is True, or above -inf and then added."""
    b, h, g, q, _ = query.shape
    m, dv = values.shape[2:]
    mask = mask.expand(b, h, g, q, m)
    out, lse = (
        torch.zeros(b, h, g, q, dv, dtype=torch.float64),
        torch.full((b, h, g, q), -math.inf, dtype=torch.float64),
    )
    for i in torch.cartesian_prod(torch.arange(b), torch.arange(h), torch.arange(g), torch.arange(q)).tolist():
        row = mask[tuple(i)]
        allowed = (row if row.dtype == torch.bool else row > -math.inf).nonzero().flatten()
        if not len(allowed):
            continue
        scores = keys[i[0], i[1], allowed].double() @ query[tuple(i)].double() * scale
        if logit_correction is not None:
            scores = scores + logit_correction[i[0], i[1], i[2], 0, allowed].double()
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if row.dtype != torch.bool:
            scores = scores + row[allowed].double()
        lse[tuple(i)] = scores.logsumexp(0)
        out[tuple(i)] = scores.softmax(0) @ values[i[0], i[1], allowed].double()
    return out, lse


def assert_close(actual: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == torch.float32
        assert ours.shape == theirs.shape
        infinite = theirs.isinf()
        assert torch.equal(ours.isinf(), infinite)
        largest = max(1.0, float(theirs.masked_fill(infinite, 0.0).abs().max()))
        off = float((ours - theirs).masked_fill(infinite, 0.0).abs().max())
        assert off <= 2e-6 * largest, f"off by {off}"


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_attend(shape: tuple[int, ...], dtype: torch.dtype, softcap: float | None) -> None:
    query, keys, values = draw(shape, dtype)
    b, h, g, q, m, *_ = shape
    for mask_shape in [(b, h, g, q, m), (b, h, 1, 1, m), (b, 1, 1, q, m), (1, 1, 1, q, m)]:
        mask = torch.rand(mask_shape) < 0.6
        mask[..., 0, :] = False  # a query that may attend to nothing
        actual = attend(query, keys, values, mask, 0.4, softcap)
        assert_close(actual, brute_force(query, keys, values, mask, 0.4, softcap))
        assert bool((actual[0][..., 0, :] == 0).all())
        assert bool((actual[1][..., 0] == -math.inf).all())


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_attend_with_an_additive_mask(shape: tuple[int, ...], softcap: float | None) -> None:
    """Biases are added after the softcap; -inf forbids."""
    query, keys, values = draw(shape)
    b, h, g, q, m, *_ = shape
    for mask_shape in [(b, h, g, q, m), (b, 1, 1, q, m)]:
        mask = torch.randn(mask_shape).masked_fill(torch.rand(mask_shape) < 0.3, -math.inf)
        assert_close(
            attend(query, keys, values, mask, 0.3, softcap), brute_force(query, keys, values, mask, 0.3, softcap)
        )


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_attend_with_an_excess(shape: tuple[int, ...], softcap: float | None) -> None:
    """By query head, added before the softcap."""
    query, keys, values = draw(shape)
    b, h, g, _, m, *_ = shape
    logit_correction, mask = torch.randn(b, h, g, 1, m), torch.rand(b, h, 1, 1, m) < 0.7
    actual = attend(query, keys, values, mask, 0.3, softcap, logit_correction)
    assert_close(actual, brute_force(query, keys, values, mask, 0.3, softcap, logit_correction))


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 3e38])
def test_what_nobody_may_attend_to_does_not_matter(garbage: float, additive: bool) -> None:
    """Keys and values of places that were never written."""
    query, keys, values = draw((2, 3, 2, 4, 24, 8, 5))
    never = torch.rand(2, 3, 24) < 0.4
    mask = (torch.rand(2, 3, 1, 4, 24) < 0.7) & ~never[:, :, None, None]
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    expected = brute_force(query, keys, values, mask, 0.3, None)
    keys[never], values[never] = garbage, garbage
    assert_close(attend(query, keys, values, mask, 0.3), expected)


def test_attend_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many queries are done some at a time; the result is the same, with masks of one row and of many."""
    query, keys, values = draw((2, 2, 2, 13, 20, 4, 6))
    for mask in (torch.rand(2, 1, 1, 13, 20) < 0.7, torch.rand(2, 2, 1, 1, 20) < 0.7):
        whole = attend(query, keys, values, mask, 0.5)
        monkeypatch.setattr(reference, "_SCORE_TILE_ELEMENTS", 3 * 8 * 20)
        assert_close(attend(query, keys, values, mask, 0.5), (whole[0].double(), whole[1].double()))
        monkeypatch.undo()


@pytest.mark.parametrize("cuts", [[20], [1, 19], [7, 7, 6], [0, 20], [5, 1, 8, 6]])
def test_merge_attention(cuts: list[int]) -> None:
    """Attention in pieces is attention over the union, also where a piece, or all, may not be attended to."""
    query, keys, values = draw((2, 2, 3, 4, 20, 4, 6))
    mask = torch.rand(2, 2, 1, 4, 20) < 0.5
    mask[:, :, :, 0], mask[:, :, :, 1, 5:] = False, False
    parts = []
    for part_keys, part_values, part_mask in zip(
        keys.split(cuts, 2), values.split(cuts, 2), mask.split(cuts, 4), strict=True
    ):
        parts.append(attend(query, part_keys, part_values, part_mask, 0.5))
    merged = merge_attention(parts)
    assert_close(merged, brute_force(query, keys, values, mask, 0.5, None))


def test_merge_attention_of_large_scores() -> None:
    """Scores of several hundred: the exponentials of no piece may overflow."""
    query, keys, values = draw((1, 1, 1, 2, 12, 4, 4))
    query *= 300
    mask = torch.ones(1, 1, 1, 1, 12, dtype=torch.bool)
    parts = [
        attend(query, k, v, m, 1.0)
        for k, v, m in zip(keys.split(4, 2), values.split(4, 2), mask.split(4, 4), strict=True)
    ]
    out, lse = merge_attention(parts)
    expected, _ = brute_force(query, keys, values, mask, 1.0, None)
    assert bool(torch.isfinite(lse).all())
    assert float((out - expected).abs().max()) < 1e-3


def test_apply_attention_sinks() -> None:
    """A sink is one more logit per query head, with a value of zero; alone it leaves nothing."""
    query, keys, values = draw((2, 2, 3, 4, 9, 4, 5))
    mask = torch.rand(2, 1, 1, 4, 9) < 0.6
    mask[:, :, :, 0] = False
    sinks = torch.tensor([-3.0, 0.0, 2.0, 5.0, 40.0, -40.0])
    out = apply_attention_sinks(*attend(query, keys, values, mask, 0.5), sinks)
    zero = torch.zeros(2, 2, 1, 5)
    for head, logit in enumerate(sinks.tolist()):
        h, g = divmod(head, 3)
        # a key that gives this logit for every query: an extra channel in which only the sink's key and the query are not 0
        more_query = torch.cat([query[:, h : h + 1, g : g + 1], torch.ones(2, 1, 1, 4, 1)], -1)
        more_keys = torch.cat([keys[:, h : h + 1], torch.zeros(2, 1, 9, 1)], -1)
        more_keys = torch.cat([more_keys, torch.tensor([0.0] * 4 + [logit / 0.5]).expand(2, 1, 1, 5)], 2)
        more_values = torch.cat([values[:, h : h + 1], zero[:, h : h + 1]], 2)
        more_mask = torch.cat([mask, torch.ones(2, 1, 1, 4, 1, dtype=torch.bool)], -1)
        expected, _ = brute_force(more_query, more_keys, more_values, more_mask, 0.5, None)
        assert float((out[:, h, g] - expected[:, 0, 0]).abs().max()) <= 2e-6


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("num_queries", [1, 8])
def test_dense_attention(group: int, num_queries: int) -> None:
    """Causal without a mask, by the mask with one; KV heads are shared by neighbouring query heads."""
    query, keys, values = draw((2, 2, group, num_queries, num_queries, 4, 6))
    flat = query.flatten(1, 2)
    causal = torch.ones(num_queries, num_queries, dtype=torch.bool).tril()
    for mask in (None, torch.rand(2, 1, num_queries, num_queries) < 0.7):
        if mask is not None:
            mask |= torch.eye(num_queries, dtype=torch.bool)
        allowed = causal.view(1, 1, 1, *causal.shape) if mask is None else mask.unsqueeze(1)
        expected, _ = brute_force(query, keys, values, allowed, 0.7, None)
        actual = dense_attention(flat, keys, values, mask, 0.7)
        assert float((actual.view(expected.shape) - expected).abs().max()) <= 2e-6
