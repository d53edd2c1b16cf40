"""Keys and values gathered from pages by the interpreted kernel, against the pages' own layout."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from spin_hf.kernels import ResidentPages
from spin_hf.kernels.reference import take_rows
from spin_hf.storage.page_layout import PageLayout

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu runs the kernels themselves"),
]
SEGMENT, HEADS = 4, 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("page_size", "key_dim", "value_dim", "tile"),
    [(4, 16, 16, 128), (8, 20, 12, 1 << 20), (3, 5, 7, 1), (1, 8, 24, 64)],
)
@pytest.mark.parametrize("missing", [0, 1, 5])
def test_gather(
    page_size: int, key_dim: int, value_dim: int, tile: int, missing: int, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Segments of two sequences in any order, on several chunks; the last pages are not whole."""
    from spin_hf.kernels.prompt import gather_tokens as module

    monkeypatch.setattr(module, "_TILE_NUMBERS", tile)
    layout = PageLayout(page_size, key_dim, value_dim, dtype)
    rows_per_chunk = 2 * SEGMENT * HEADS
    numbers = torch.arange(3 * rows_per_chunk * layout.row_elements) % 251  # exact in bfloat16
    chunks = [chunk.clone() for chunk in numbers.to(dtype).view(3, rows_per_chunk, layout.row_elements)]
    table = torch.tensor([chunk.data_ptr() for chunk in chunks])
    directory = torch.tensor([[4, 0, 3], [1, 5, 2]]).view(2, 1, 3, 1)
    rows = ((directory * HEADS + torch.arange(HEADS).view(1, -1, 1, 1)) * SEGMENT + torch.arange(SEGMENT)).flatten(2)
    rows = rows[:, :, SEGMENT:]  # a view, from the second segment on
    keys, values = (states.flatten(2, 3) for states in layout.take(take_rows(chunks, rows)))
    num_tokens = rows.shape[2] * page_size - missing
    pages = ResidentPages(table, rows, rows_per_chunk, SEGMENT, page_size, key_dim, value_dim, dtype)
    found = module.gather_tokens(pages, num_tokens)
    assert all(each.is_contiguous() for each in found)
    assert torch.equal(found[0], keys[:, :, :num_tokens])
    assert torch.equal(found[1], values[:, :, :num_tokens])
