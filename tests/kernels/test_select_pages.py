"""Zones and selections of pages against loops over tokens and sorted lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spin_hf.backends.descriptors import capacity_for
from spin_hf.kernels.descriptor_fields import BIN_TILE_PAGES
from spin_hf.kernels.reference import list_pages, page_zones, select_top_pages

PAGE_SIZE = 8


def zones_by_token(valid: list[bool], sinks: int, recent: int) -> tuple[set[int], set[int]]:
    """Fixed pages and candidates of one sequence, token by token."""
    real = [token for token, is_valid in enumerate(valid) if is_valid]
    fixed = {token // PAGE_SIZE for token in real[:sinks]} | {
        token // PAGE_SIZE for token in real[len(real) - min(recent, len(real)) :]
    }
    return fixed, {token // PAGE_SIZE for token in real} - fixed


def pages_of(chosen: torch.Tensor) -> set[int]:
    return set(chosen.nonzero().flatten().tolist())


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    st.lists(st.lists(st.booleans(), min_size=48, max_size=48), min_size=1, max_size=3),
    st.integers(0, 20),
    st.integers(1, 50),
)
def test_page_zones(valid: list[list[bool]], sinks: int, recent: int) -> None:
    per_page = torch.tensor(valid).view(len(valid), -1, PAGE_SIZE).sum(2)
    fixed, candidates = page_zones(per_page, sinks, recent)
    assert fixed.dtype == candidates.dtype == torch.bool
    for row, tokens in enumerate(valid):
        assert (pages_of(fixed[row]), pages_of(candidates[row])) == zones_by_token(tokens, sinks, recent)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 63, 64, 65])
def test_page_zones_of_whole_sequences(length: int) -> None:
    num_pages = -(-length // PAGE_SIZE)
    tokens = torch.arange(num_pages * PAGE_SIZE) < length
    fixed, candidates = page_zones(tokens.view(1, num_pages, PAGE_SIZE).sum(2), 4, 9)
    assert (pages_of(fixed[0]), pages_of(candidates[0])) == zones_by_token(tokens.tolist(), 4, 9)
    assert num_pages - 1 in pages_of(fixed[0])  # a query always attends to its own page


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4))
def test_list_pages(chosen: list[list[bool]]) -> None:
    pages = list_pages(torch.tensor(chosen))
    expected = [[page for page, is_chosen in enumerate(row) if is_chosen] for row in chosen]
    width = max(len(row) for row in expected)
    assert pages.shape == (len(chosen), width)
    assert pages.tolist() == [row + [-1] * (width - len(row)) for row in expected]


@pytest.mark.parametrize("num_pages", [[3], [1, 5], [0, 2, 40]])
@pytest.mark.parametrize("num_candidates", [1, 7, 23])
def test_select_top_pages(num_pages: list[int], num_candidates: int) -> None:
    """Best first, then -1: with too few candidates, or a budget smaller than that of other rows."""
    rows, heads = len(num_pages), 3
    scores = torch.randperm(rows * heads * 23)[: rows * heads * num_candidates].float().view(rows, heads, -1)
    scores[:, 1, ::2] = float("-inf")
    scores[:, 2, num_candidates // 2] = float("inf")
    pages = select_top_pages(scores, torch.tensor(num_pages))
    assert pages.dtype == torch.int64
    assert pages.shape == (rows, heads, min(max(num_pages), num_candidates))
    for row in range(rows):
        for head in range(heads):
            values = scores[row, head].tolist()
            order = sorted((p for p in range(num_candidates) if values[p] > float("-inf")), key=lambda p: -values[p])
            wanted = order[: num_pages[row]]
            assert pages[row, head].tolist() == wanted + [-1] * (pages.shape[2] - len(wanted))


def test_select_top_pages_without_candidates() -> None:
    scores = torch.full((2, 2, 5), float("-inf"))
    assert bool((select_top_pages(scores, torch.tensor([3, 2])) == -1).all())
    assert select_top_pages(scores[..., :0], torch.tensor([3, 2])).shape == (2, 2, 0)


@pytest.mark.parametrize("num_pages", [1, 31, 512, 513, 1023, 1024, 1025, 2049, 8681, 16_384, 32_785, 200_001])
def test_bin_lists_of_all_pages_have_places(num_pages: int) -> None:
    """At worst all pages are listed: rank r of list p of n is at r * n + p, and the longest list has the most ranks."""
    num_lists, run = -(-num_pages // BIN_TILE_PAGES), 32
    ranks = max(
        sum(min(run, num_pages - first) for first in range(index * run, num_pages, num_lists * run))
        for index in range(num_lists)
    )
    capacity = capacity_for(num_pages)
    assert num_pages <= capacity
    assert ranks * num_lists <= capacity
    assert capacity <= max(1024, 2 * num_pages)
    assert num_pages < 16 * BIN_TILE_PAGES or capacity < 1.13 * num_pages
