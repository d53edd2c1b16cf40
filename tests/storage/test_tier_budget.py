"""TierBudget: the arithmetic of caps, checked by adding up what a layer would hold.

compute tier   rows * summary_bytes + tables (4 bytes a page) + frames * (page_bytes + 12)      per layer
cpu tier       rows * host_page_bytes                                                                per layer
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spin_hf.errors import BudgetError, CapacityError
from spin_hf.storage.page_table import SEGMENT_PAGES
from spin_hf.storage.tier_budget import TierBudget, coarsely

SIZES = dict(num_layers=3, num_heads=2, page_bytes=512, host_page_bytes=288, summary_bytes=36, min_frames=5)


def budget(gpu_memory: int | None, cpu_memory: int | None = None, **sizes: int) -> TierBudget:
    return TierBudget(**(SIZES | sizes), gpu_memory=gpu_memory, cpu_memory=cpu_memory)


def paged_bytes(sizes: TierBudget, batch_size: int, num_segments: int, num_pages: int, frames: int) -> int:
    """Bytes of all layers in the compute tier with that many frames."""
    streams = batch_size * sizes.num_heads
    table = -(-num_pages // SEGMENT_PAGES) * SEGMENT_PAGES
    summaries = num_segments * SEGMENT_PAGES * sizes.num_heads * sizes.summary_bytes
    return sizes.num_layers * (summaries + streams * table * 4 + streams * frames * (sizes.page_bytes + 12))


def test_no_cap() -> None:
    assert budget(None).num_frames(4, 1000, 8000) is None


def test_everything_fits_exactly() -> None:
    whole = 4 * SEGMENT_PAGES * 2 * (512 + 36) * 3
    assert budget(whole).num_frames(1, 4, 100) is None
    assert budget(whole - 1).num_frames(1, 4, 100) is not None


@settings(deadline=None, derandomize=True, max_examples=400)
@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 4096), st.integers(0, 300), st.integers(1, 12),
    st.integers(1, 3), st.integers(1, 200), st.integers(1, 10**7),
)  # fmt: skip
def test_frames_fill_the_cap(
    layers: int,
    heads: int,
    page_bytes: int,
    summary_bytes: int,
    min_frames: int,
    batch_size: int,
    num_pages: int,
    cap: int,
) -> None:
    segments = batch_size * -(-num_pages // SEGMENT_PAGES)
    sizes = budget(
        cap,
        num_layers=layers,
        num_heads=heads,
        page_bytes=page_bytes,
        summary_bytes=summary_bytes,
        min_frames=min_frames,
    )
    try:
        frames = sizes.num_frames(batch_size, segments, num_pages)
    except BudgetError as error:
        assert error.needed_bytes is not None
        assert error.needed_bytes > cap
        assert str(error.needed_bytes) in str(error)
        assert "gpu_memory" in str(error)
        assert cap // layers < paged_bytes(sizes, batch_size, segments, num_pages, min_frames) // layers
        enough = budget(
            error.needed_bytes, num_layers=layers, num_heads=heads, page_bytes=page_bytes, summary_bytes=summary_bytes,
            min_frames=min_frames,
        )  # fmt: skip
        allowed = enough.num_frames(batch_size, segments, num_pages)
        assert allowed is None or allowed >= min(min_frames, num_pages)
        return
    if frames is None:
        assert segments * SEGMENT_PAGES * heads * (page_bytes + summary_bytes) * layers <= cap
        return
    table = -(-num_pages // SEGMENT_PAGES) * SEGMENT_PAGES
    assert min(min_frames, table) <= frames <= coarsely(table)
    assert paged_bytes(sizes, batch_size, segments, num_pages, frames) <= cap
    # What is left is for a context a little longer; the division among layers may leave less than a byte each.
    room = coarsely(segments * SEGMENT_PAGES * heads) // heads - segments * SEGMENT_PAGES + SEGMENT_PAGES
    longer = coarsely(table)
    more = paged_bytes(sizes, batch_size, segments, longer, frames + 1) + layers * heads * room * summary_bytes
    assert frames >= table or more > cap - layers


def test_frames_stay_as_many_while_a_context_grows() -> None:
    """Their contents are copied when their number changes: seldom, and not with every segment."""
    sizes = budget(10**8, page_bytes=4096)
    numbers = [sizes.num_frames(1, segments, segments * SEGMENT_PAGES) for segments in range(1024, 2048)]
    assert len(set(numbers)) <= 1 + 16


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 600), st.integers(5, 700), st.lists(st.integers(0, 600), min_size=1, max_size=6))
def test_shares_by_length(num_pages: int, frames: int, held: list[int]) -> None:
    """No more in total than before, none below the minimum or above its pages, and longer rows have no fewer."""
    held, sizes = [min(number, num_pages) for number in held], budget(10**6, selected=8)
    assert sizes.slot_counts(frames, num_pages, None) == frames
    counts = sizes.slot_counts(frames, num_pages, held)
    if frames >= num_pages:
        assert counts == frames
        return
    assert isinstance(counts, tuple)
    assert sum(counts) <= frames * len(held)
    least = min(frames, sizes.step_frames(num_pages))
    for count, number in zip(counts, held, strict=True):
        assert least <= count <= max(least, min(num_pages, coarsely(number)))
    assert [counts[i] for i in sorted(range(len(held)), key=held.__getitem__)] == sorted(counts)
    spare = frames * len(held) - sum(counts)
    full = all(count == max(least, min(num_pages, coarsely(n))) for count, n in zip(counts, held, strict=True))
    assert full or spare < len(held)
    even = sizes.slot_counts(frames, num_pages, [num_pages] * len(held))
    assert even == (frames,) * len(held)


def test_frames_of_a_step() -> None:
    """Sinks, recent window and selected pages: a number of pages, or a fraction of them, and no more than there are."""
    assert [budget(1, selected=3).step_frames(pages) for pages in (1, 6, 7, 100)] == [5, 6, 7, 7]
    assert [budget(1, selected=0.1).step_frames(pages) for pages in (1, 6, 100, 101)] == [5, 5, 14, 15]


def test_frames_that_are_made_by_and_by() -> None:
    """Few while a prompt is read; as many as pages, or as fit, once pages are in the cpu tier."""
    assert budget(10**6, most_frames=20).num_frames(1, 40, 1280) == 20
    assert budget(10**6, most_frames=2, selected=8).num_frames(1, 40, 1280) == 12
    assert budget(10**9).num_frames(1, 4, 100, True) == 128
    assert budget(None).num_frames(1, 4, 100, True) == 128


@given(st.integers(1, 40), st.integers(1, 9))
def test_chunks_are_counted_whole(segments: int, chunk: int) -> None:
    whole = -(-segments // chunk) * chunk
    one, other = budget(10**6, chunk_segments=chunk), budget(10**6)
    assert one.resident_bytes(1, segments) == other.resident_bytes(1, whole)
    assert one.bytes_with(7, 1, segments, 50) == other.bytes_with(7, 1, whole, 50)
    assert one.host_bytes(segments) == other.host_bytes(segments)


@given(st.integers(1, 10**7))
def test_coarse_numbers(number: int) -> None:
    assert number <= coarsely(number) <= number + max(SEGMENT_PAGES - 1, number // 16)
    assert coarsely(coarsely(number)) == coarsely(number)


def test_cpu_memory() -> None:
    """It counts only pages in the cpu tier, and in full segments."""
    needed = 10 * SEGMENT_PAGES * 2 * 288 * 3
    assert budget(None, 1).num_frames(1, 10, 300) is None
    assert budget(10**6, needed).num_frames(1, 10, 300) is not None
    with pytest.raises(CapacityError, match=f"{needed} bytes.*cpu_memory is {needed - 1}.*raise cpu_memory"):
        budget(10**6, needed - 1).num_frames(1, 10, 300)


def test_errors_are_also_standard_ones() -> None:
    with pytest.raises(ValueError, match="gpu_memory=100"):
        budget(100).num_frames(1, 1, 10)
    with pytest.raises(MemoryError):
        budget(100, 1).num_frames(1, 1, 10)
