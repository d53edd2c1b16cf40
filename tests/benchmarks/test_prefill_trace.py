"""How a trace of a prompt is summed up."""

from __future__ import annotations

from benchmarks.speed.prefill_trace import common, gaps, joined, largest, length, summary

MS = 1_000_000
COMPUTE = [(0, 2 * MS, "product"), (2 * MS, 3 * MS, "norm"), (7 * MS, 9 * MS, "product"), (9 * MS, 10 * MS, "norm")]
COPIES = [(1 * MS, 5 * MS, "load"), (8 * MS, 9 * MS, "load")]
HOST = [(0, MS, "cudaLaunchKernel"), (3 * MS, 6 * MS, "cudaMalloc"), (6 * MS, 7 * MS, "cudaLaunchKernel")]


def test_ranges() -> None:
    busy, other = joined(COMPUTE), joined(COPIES)
    assert busy == [(0, 3 * MS), (7 * MS, 10 * MS)]
    assert (length(busy), length(other)) == (6 * MS, 5 * MS)
    assert common(busy, other) == 3 * MS
    assert common(busy, []) == 0
    assert joined([(4, 9, ""), (1, 5, ""), (2, 3, "")]) == [(1, 9)]


def test_a_gap_is_named_by_the_call_that_fills_it() -> None:
    assert gaps(COMPUTE, HOST) == {"norm -> product (cudaMalloc)": (1, 4 * MS)}
    assert gaps(COMPUTE, HOST[:1]) == {"norm -> product": (1, 4 * MS)}


def test_summary() -> None:
    found = summary({7: COMPUTE, 13: COPIES}, HOST)
    assert (found["span_ms"], found["compute_busy_ms"], found["copies_busy_ms"], found["copies_hidden_ms"]) == (
        10,
        6,
        5,
        3,
    )
    assert found["kernels"] == {"product": [2, 4.0], "norm": [2, 2.0]}
    assert list(found["host_calls"]) == ["cudaMalloc", "cudaLaunchKernel"]


def test_largest_first() -> None:
    assert list(largest({str(i): (1, i) for i in range(40)}))[:2] == ["39", "38"]
