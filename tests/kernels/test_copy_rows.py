"""Rows of chunked arrays, and the layout of a page, against one flat array indexed with loops."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from spin_hf.kernels.reference import put_rows, put_tokens, split_pages, take_rows
from spin_hf.storage.page_layout import PageLayout

DTYPES = [torch.float32, torch.bfloat16, torch.int32]


def chunked(num_chunks: int, rows: int, row_shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Chunks in which every element is another number, so that a wrong row cannot go unnoticed."""
    total = num_chunks * rows * int(torch.Size(row_shape).numel())
    flat = torch.arange(total, dtype=torch.float32) % 251  # exact in bfloat16
    return [chunk.clone() for chunk in flat.to(dtype).view(num_chunks, rows, *row_shape)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row_shape", [(), (1,), (5,), (3, 2)])
@pytest.mark.parametrize(("num_chunks", "rows"), [(1, 7), (2, 1), (3, 4)])
def test_take_rows(num_chunks: int, rows: int, row_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    chunks = chunked(num_chunks, rows, row_shape, dtype)
    ids = torch.randint(0, num_chunks * rows, (2, 3, 5))
    taken = take_rows(chunks, ids)
    assert taken.shape == (2, 3, 5, *row_shape)
    assert taken.dtype == dtype
    for index in torch.cartesian_prod(*(torch.arange(n) for n in ids.shape)).tolist():
        row = int(ids[tuple(index)])
        assert torch.equal(taken[tuple(index)], chunks[row // rows][row % rows])


@pytest.mark.parametrize("num_chunks", [1, 3])
def test_take_rows_copies(num_chunks: int) -> None:
    chunks = chunked(num_chunks, 4, (2,), torch.float32)
    before = [chunk.clone() for chunk in chunks]
    take_rows(chunks, torch.arange(4)).fill_(-1.0)
    assert all(torch.equal(a, b) for a, b in zip(chunks, before, strict=True))
    assert take_rows(chunks, torch.empty((2, 0, 3), dtype=torch.int64)).shape == (2, 0, 3, 2)


@pytest.mark.parametrize("row_shape", [(), (5,), (3, 2)])
@pytest.mark.parametrize(("num_chunks", "rows"), [(1, 7), (2, 3), (4, 2)])
def test_put_rows(num_chunks: int, rows: int, row_shape: tuple[int, ...]) -> None:
    chunks = chunked(num_chunks, rows, row_shape, torch.float32)
    flat = torch.cat([chunk.clone() for chunk in chunks])
    ids = torch.randperm(num_chunks * rows)[:6].view(2, 3)
    values = -torch.rand((2, 3, *row_shape)) - 1
    addresses = [chunk.data_ptr() for chunk in chunks]
    put_rows(chunks, ids, values)
    for i in range(2):
        for j in range(3):
            flat[int(ids[i, j])] = values[i, j]
    assert torch.equal(torch.cat(chunks), flat)  # and no other row was touched
    assert [chunk.data_ptr() for chunk in chunks] == addresses


@pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only")
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="arrays on a GPU are copied so by all other tests"
)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize("row_shape", [(), (3,), (8,), (3, 2), (700,), (4099,)])
@pytest.mark.parametrize(("num_chunks", "rows"), [(1, 7), (3, 4), (2, 40)])
def test_kernel_copies_rows(num_chunks: int, rows: int, row_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from spin_hf.kernels.indexing.copy_rows import rows_copiers
    from spin_hf.kernels.launch import RowCopy

    chunks, expected = (
        [chunk.to(dtype) for chunk in chunked(num_chunks, rows, row_shape, torch.int32)] for _ in range(2)
    )
    ids = torch.randperm(num_chunks * rows, generator=torch.Generator().manual_seed(0))[:-2]
    table = torch.tensor([chunk.data_ptr() for chunk in chunks])
    taken = torch.full((len(ids), *row_shape), 7, dtype=dtype)
    (take,) = rows_copiers([[RowCopy([table], rows, ids, taken[None])]], put=False)
    take()
    assert torch.equal(taken, take_rows(expected, ids))
    taken.neg_()
    put, nothing = rows_copiers(
        [[RowCopy([table], rows, ids, taken[None])], [RowCopy([table], rows, ids[:0], taken[None, :0])]], put=True
    )
    put()
    put_rows(expected, ids, taken)
    assert all(torch.equal(a, b) for a, b in zip(chunks, expected, strict=True))
    nothing()
    rows_copiers([[]], put=True)[0]()


@pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only")
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="arrays on a GPU are copied so by all other tests"
)
def test_kernel_copies_rows_of_several_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups of copies, of two arrays each. Those with short rows share a launch, whatever their sizes and numbers."""
    from spin_hf.kernels.indexing import copy_rows
    from spin_hf.kernels.launch import RowCopy

    launches, launch_now = [], copy_rows.launch_now
    monkeypatch.setattr(copy_rows, "launch_now", lambda *args, **options: launches.append(launch_now(*args, **options)))
    generator = torch.Generator().manual_seed(0)
    shapes = [((6,), torch.int8, 1), ((), torch.float32, 1), ((4, 8), torch.int16, 4), ((300,), torch.float32, 1)]
    groups: list[list[RowCopy]] = []
    expected, arrays = [], []
    for number in range(2):
        groups.append([])
        for row_shape, dtype, each in shapes:
            size = 24 // each
            held = [[chunk.to(dtype) for chunk in chunked(3, size, row_shape, torch.int32)] for _ in range(2)]
            ids = torch.randperm(3 * size, generator=generator)[: 60 // each - number].sort().values
            packed = (torch.rand((2, len(ids), *row_shape), generator=generator) * 99).to(dtype)
            tables = [torch.tensor([chunk.data_ptr() for chunk in chunks]) for chunks in held]
            groups[-1].append(RowCopy(tables, size, ids, packed))
            arrays.append(held)
            wanted = [[chunk.clone() for chunk in chunks] for chunks in held]
            for chunks, content in zip(wanted, packed, strict=True):
                put_rows(chunks, ids, content)
            expected.append(wanted)
    first, second = copy_rows.rows_copiers(groups, put=True)
    before = [[[chunk.clone() for chunk in chunks] for chunks in held] for held in arrays]
    first()
    for held, wanted in zip(arrays, expected[:4] + before[4:], strict=True):
        assert all(torch.equal(torch.cat(a), torch.cat(b)) for a, b in zip(held, wanted, strict=True))
    assert len(launches) == 2, "one for short rows, one for rows of 1,200 bytes"
    second()
    for held, wanted in zip(arrays, expected, strict=True):
        assert all(torch.equal(torch.cat(a), torch.cat(b)) for a, b in zip(held, wanted, strict=True))
    taken = [[copy._replace(packed=torch.zeros_like(copy.packed)) for copy in groups[1]]]
    copy_rows.rows_copiers(taken, put=False)[0]()
    for copy, wrote in zip(taken[0], groups[1], strict=True):
        assert torch.equal(copy.packed, wrote.packed)


@pytest.mark.parametrize(("key_dim", "value_dim", "page_size"), [(4, 4, 8), (3, 5, 8), (1, 2, 1), (6, 1, 3)])
def test_split_pages_is_keys_then_values(key_dim: int, value_dim: int, page_size: int) -> None:
    pages = torch.arange(2 * page_size * (key_dim + value_dim)).view(2, -1)
    keys, values = split_pages(pages, page_size, key_dim)
    assert keys.shape == (2, page_size, key_dim)
    assert values.shape == (2, page_size, value_dim)
    assert torch.equal(torch.cat([keys.flatten(1), values.flatten(1)], 1), pages)
    assert keys.data_ptr() == pages.data_ptr()  # views: what is written to them reaches the page
    values.fill_(-1)
    assert int((pages == -1).sum()) == values.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("first", "count"),
    [(0, 1), (5, 2), (6, 2), (6, 4), (0, 8), (8, 15), (3, 21), (0, 24), (0, 72), (7, 60), (24, 48), (25, 30)],
)
def test_put_tokens(first: int, count: int, dtype: torch.dtype) -> None:
    """Runs that begin and end within pages, at pages, and at segments, of one segment and of several."""
    segments, heads, num_pages, page_size, key_dim, value_dim = 3, 2, 3, 8, 3, 2
    layout = PageLayout(page_size, key_dim, value_dim, dtype)
    pages = torch.full((segments, heads, num_pages, layout.row_elements), float("nan"), dtype=dtype)
    expected = pages.clone()
    keys = torch.randn(count, heads, key_dim).transpose(0, 1)
    values = torch.randn(heads, count, value_dim)
    put_tokens(pages, first, layout.encode(keys, values), layout.split)
    for token in range(count):
        page, offset = divmod(first + token, page_size)
        row = expected[page // num_pages, :, page % num_pages]
        first_value = page_size * key_dim + offset * value_dim
        row[:, offset * key_dim : (offset + 1) * key_dim] = keys[:, token].to(dtype)
        row[:, first_value : first_value + value_dim] = values[:, token].to(dtype)
    assert torch.equal(pages.nan_to_num(99.0), expected.nan_to_num(99.0))
