"""A kernel that stores what `prefetch_tile` would bring to the cache. Imported only where triton exists."""

from __future__ import annotations

import triton
import triton.language as tl

from spin_hf.kernels.common import SCALE_0, SUMMARY_0, SUMMARY_1, SUMMARY_2, SUMMARY_3, SUMMARY_4
from spin_hf.kernels.decode.prefetch_tile import tile_runs
from spin_hf.kernels.decode.scan_pages import _places, _segments


@triton.jit
def store_runs_kernel(
    layer, directory, starts, sizes, begin, end, heads: tl.constexpr, key_dim: tl.constexpr,
    value_dim: tl.constexpr, page: tl.constexpr, unit: tl.constexpr, segment: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """Addresses and numbers of bytes, [32] both, of the tile from page `begin` on of KV head h."""
    h = tl.program_id(0).to(tl.int64)
    tables = (
        tl.load(layer + SUMMARY_0), tl.load(layer + SCALE_0), tl.load(layer + SUMMARY_1), tl.load(layer + SUMMARY_2),
        tl.load(layer + SUMMARY_3), tl.load(layer + SUMMARY_4),
    )  # fmt: skip
    places = _places(tables, _segments(directory, begin, end, segment), h, heads, segment, chunk)
    start, size = tile_runs(places, key_dim, value_dim, page, unit, segment)
    lane = h * 32 + tl.arange(0, 32)
    tl.store(starts + lane, start)
    tl.store(sizes + lane, size)
