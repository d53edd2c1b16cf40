"""`metadata.py`: a cache on the meta device holds what `plan` says, and its tables do not depend on the longest context."""

from __future__ import annotations

import pytest

from benchmarks.memory import metadata


@pytest.mark.parametrize("method", ["shadowkv", "retroinfer", "bisection", "quest"])
@pytest.mark.parametrize("cap", ["auto", "300MiB"])
def test_rows(method: str, cap: str) -> None:
    one, two = (metadata.measure(batch_size, 4096, method, cap) for batch_size in (1, 2))
    assert (one["page_frames"] > 0) == (cap != "auto")
    addresses = one["metadata"]["address tables"]
    assert addresses == two["metadata"]["address tables"]
    if cap == "auto":  # the cap is shared by the sequences, and so are the page frames
        assert two["metadata_bytes"] - addresses == 2 * (one["metadata_bytes"] - addresses)
        assert two["flat_bytes"] == 2 * one["flat_bytes"]
    assert two["metadata_bytes"] < two["flat_bytes"] / 2
    assert len(metadata.lines([one, two])) == 4
