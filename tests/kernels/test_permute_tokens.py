"""Tokens that are permuted, and means of pages, by the kernels interpreted on the CPU, against PyTorch."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from spin_hf.kernels import reference

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu runs the kernels themselves"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
@pytest.mark.parametrize("widths", [(8, 8), (5, 3), (16,), (4, 4, 0, 1, 1)])
@pytest.mark.parametrize(("pages", "page_size"), [(1, 8), (9, 8), (3, 5), (0, 8)])
def test_move_tokens(pages: int, page_size: int, widths: tuple[int, ...], dtype: torch.dtype) -> None:
    from spin_hf.kernels.indexing.permute_tokens import move_tokens

    generator = torch.Generator().manual_seed(pages)
    content = torch.randint(-99, 99, (2, 3, pages, page_size * sum(widths)), generator=generator).to(dtype)
    order = torch.rand((2, 3, pages * page_size), generator=generator).argsort(2)
    before = content.clone()
    begins = [page_size * sum(widths[:i]) for i in range(len(widths))]
    parts = tuple((first, width) for first, width in zip(begins, widths, strict=True) if width)
    moved = move_tokens(content, order, page_size, parts)
    assert torch.equal(content, before)
    assert torch.equal(moved, reference.move_tokens(content, order, page_size, parts))
    if pages:
        place, token = 1, int(order[1, 2, 1])
        page = moved[1, 2].view(pages, -1)[place // page_size]
        first = content[1, 2, token // page_size, token % page_size * widths[0] :][: widths[0]]
        assert torch.equal(page[place * widths[0] :][: widths[0]], first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dim", [1, 16, 20, 128])
@pytest.mark.parametrize(("pages", "page_size"), [(1, 8), (9, 8), (5, 16), (3, 64), (3, 5), (0, 8)])
def test_page_means(pages: int, page_size: int, dim: int, dtype: torch.dtype) -> None:
    from spin_hf.kernels.indexing.permute_tokens import page_means

    generator = torch.Generator().manual_seed(dim)
    whole = torch.randn((2, 3, pages, page_size * (7 + dim)), generator=generator).to(dtype)
    states = reference.split_pages(whole, page_size, 7)[1]  # a view, as values in a page
    valid = torch.rand((2, 1, pages, page_size), generator=generator) < 0.7
    if pages > 1:
        valid[:, :, 1] = False
    states.masked_fill_(~valid.unsqueeze(-1), float("nan"))
    means = page_means(states, valid)
    assert means.dtype == torch.float32
    torch.testing.assert_close(means, reference.page_means(states, valid), rtol=1e-6, atol=1e-6)
    assert pages < 2 or not bool(means[:, :, 1].any())
