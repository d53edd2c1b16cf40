"""Rating and choosing in one launch: what the two kernels in turn make, and as often as it is launched."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch

from spin_hf.kernels.recipe import KernelRecipe, Rating
from tests.support.coded_case import CodedCase

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu runs the kernels themselves"),
]

RECIPE = KernelRecipe(Rating.MEAN)


def scanned(**options: Any) -> CodedCase:
    """A case whose pages are scanned."""
    from spin_hf.kernels.triton_launchers import launchers

    case = CodedCase(lengths=(1100, 307), group=3, **options)
    common = (launchers.launch_now, case.buffers, case.scan, case.layer_buffers)
    launchers.project_queries(*common, case.query, scale=case.scale, shape=case.shape)
    launchers.scan_pages(*common, case.plan, None, group=case.group, softcap=None, shape=case.shape)
    case.buffers.histogram.zero_()
    return case


def rank(case: CodedCase, together: bool) -> None:
    """Rate and choose, in one launch or in two."""
    from spin_hf.kernels.triton_launchers import launchers

    common = (launchers.launch_now, case.buffers, case.layer_buffers, case.plan)
    chosen: dict[str, Any] = {
        "query_index": 0, "group": case.group, "most_listed": None, "recipe": RECIPE, "shape": case.shape,
    }  # fmt: skip
    if together:
        launchers.rank_pages(*common, **chosen, scan=case.scan)
    else:
        launchers.bin_scores(*common, case.query, scale=case.scale, recipe=RECIPE, shape=case.shape)
        launchers.select_pages(*common, **chosen)


@pytest.mark.parametrize("pages_per_list", [1024, 64, 8])
@pytest.mark.parametrize("floor", [2048, 0])
def test_as_rated_and_chosen_in_turn(floor: int, pages_per_list: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one program per stream that has lists, and with three that have one, two or many; with too few pages in them."""
    from spin_hf.kernels.decode import bin_scores, rank_pages, select_pages

    for module in (bin_scores, rank_pages, select_pages):
        monkeypatch.setattr(module, "BIN_TILE_PAGES", pages_per_list)
    monkeypatch.setattr(select_pages, "_SELECT_TILE", 32)
    monkeypatch.setattr(select_pages, "_TILE_LISTS", 8)
    one, two = scanned(), scanned()
    for case in (one, two):
        case.layer_buffers.floors.fill_(floor)
        rank(case, together=case is one)
    counts = two.buffers.list_count
    assert int(counts[:, 0].min()) > one.budget
    for stream, (number, _) in enumerate(counts.tolist()):
        lists = [case.listed.flatten(0, 1)[stream, :number] for case in (one, two)]
        assert torch.equal(*lists)
    for name in ("list_count", "histogram"):
        assert torch.equal(getattr(one.buffers, name), getattr(two.buffers, name)), name
    assert torch.equal(one.layer_buffers.floors, two.layer_buffers.floors)
    assert torch.equal(one.layer_buffers.counters, two.layer_buffers.counters)
    assert bool(torch.isfinite(one.scan.estimate).all())


def test_launched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrivals are zeros afterwards, so a launch that is replayed does the same."""
    from spin_hf.kernels.decode import bin_scores, rank_pages, select_pages

    for module in (bin_scores, rank_pages, select_pages):
        monkeypatch.setattr(module, "BIN_TILE_PAGES", 64)
    case = scanned()
    found = []
    for _ in range(3):
        case.buffers.histogram.zero_()
        case.buffers.list_count.fill_(-1)
        rank(case, together=True)
        assert not case.buffers.arrivals.any()
        found.append((case.buffers.list_count.clone(), case.listed_pages()))
    for counts, read in found[1:]:
        assert torch.equal(counts, found[0][0])
        assert torch.equal(read, found[0][1])
