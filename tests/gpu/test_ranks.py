"""Tensor-parallel models on GPUs: two ranks on two GPUs, over NCCL.

Tokens are those of DynamicCache in one process; where a cache approximates, those of SpinCache in one process. Ranks have the
tuning of `conftest.py`, as this process does.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from spin_hf import SpinCache
from tests.support.compare import difference
from tests.support.inspection import state_of
from tests.support.memory import SMALL_ZONES
from tests.support.rank_cases import last_logits, load_and_go_on, prompt_and_steps, read_and_generate, sequences
from tests.support.ranks import RankPool, four_heads, rank_pool, whole_model
from tests.support.tuning import tune
from tests.support.zoo import left_padded

TWO_GPUS = "needs two GPUs: NCCL takes one rank for each, and torch's collectives over gloo crash for tensors on a GPU"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason=TWO_GPUS)]

CALLS: list[dict[str, Any]] = [{}, {"num_beams": 3}]
EXACT: dict[str, Any] = {"budget": 1 << 20}
SPARSE: dict[str, Any] = {"method": "shadowkv", "budget": 16, **SMALL_ZONES}
TIERS: list[tuple[dict[str, Any], bool]] = [({}, False), ({}, True), ({"cpu_dtype": "int8"}, True)]
"""Options, and whether with the smallest `gpu_memory`."""


@pytest.fixture(autouse=True)
def short_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.ranks.WATCHDOG_SECONDS", 90.0)


def ranks() -> RankPool:
    """Two ranks, each on its GPU."""
    return rank_pool("nccl", "cuda")


def model_folder() -> str:
    """A model with heads that the kernels of all methods take."""
    return four_heads(16)


@functools.cache
def model() -> Any:
    """The model in this process, on a GPU."""
    return whole_model(model_folder()).cuda()


def tokens_of(cache: Any, **call: Any) -> torch.Tensor:
    """What `rank_cases.on_gpu` does, in this process."""
    ids, mask = left_padded([73, 58])
    return sequences(model(), cache, ids, 12, attention_mask=mask, **call)


@pytest.mark.parametrize(
    ("options", "tight"),
    [(EXACT, False), ({**EXACT, **SMALL_ZONES}, True), ({**EXACT, "method": "shadowkv"}, False)],
    ids=["resident", "paged", "shadowkv"],
)
def test_tokens_are_those_of_dynamic_cache(options: dict[str, Any], tight: bool) -> None:
    for found, captured, refused in ranks().run(2, "on_gpu", model_folder(), options, CALLS, tight):
        for call, tokens in zip(CALLS, found, strict=True):
            assert torch.equal(tokens, tokens_of(DynamicCache(config=model().config), **call)), call
        assert refused is None
        assert captured[0] > 0


@pytest.mark.parametrize(("more", "tight"), TIERS, ids=["resident", "paged", "int8"])
def test_what_approximates_is_that_of_one_process(more: dict[str, Any], tight: bool) -> None:
    options = {**SPARSE, **more}
    expected, _ = read_and_generate(model(), options, {}, tight)
    for found, _, _ in ranks().run(2, "on_gpu", model_folder(), options, [{}], tight):
        assert torch.equal(found[0], expected)


@pytest.mark.parametrize(("place", "in_steps"), [("first batch", False), ("pages", False), ("pages", True)])
def test_a_rank_that_runs_out_of_memory(place: str, in_steps: bool) -> None:
    found = ranks().run(2, "out_of_memory", model_folder(), place, 0, in_steps, EXACT)
    expected = torch.stack(last_logits(model(), DynamicCache(config=model().config), prompt_and_steps()))
    assert [each[1] for each in found] == [False, True]
    assert found[0][0] == found[1][0]
    assert str(found[0][0]).startswith("CapacityError: pages and summaries")
    for _, _, (before, after), logits in found:
        assert before == after
        assert difference(logits, expected) < 1e-4


@pytest.mark.parametrize("method", ["shadowkv", "fitted"])
@pytest.mark.parametrize("steps", ["sparse", "dense"])
def test_one_process_loads_what_two_ranks_saved(
    steps: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense steps give the tokens of DynamicCache."""
    lengths = [93, 71]
    if steps == "dense":
        tune(monkeypatch, dense_factor=1)
    found = ranks().run(2, "saved", model_folder(), str(tmp_path), {**SPARSE, "method": method}, lengths)
    assert torch.equal(found[0], found[1])
    if steps == "dense":
        ids, mask = found[0][:, :-12], left_padded(lengths)[1]
        mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], 1)
        exact = sequences(model(), DynamicCache(config=model().config), ids, 12, attention_mask=mask)
        assert torch.equal(found[0], exact)
    assert torch.equal(load_and_go_on(model(), str(tmp_path), {}, lengths), found[0])


def test_one_process_loads_clusters_of_two_ranks(tmp_path: Path) -> None:
    """Prompts so long that tokens are clustered."""
    lengths = [1160, 1141]
    found = ranks().run(2, "saved", model_folder(), str(tmp_path), {"budget": 64, **SMALL_ZONES}, lengths)
    assert torch.equal(found[0], found[1])
    loaded = SpinCache.from_pretrained(tmp_path, model())
    loaded.check_integrity()
    assert state_of(loaded).sequences.spans.num_pages
    assert torch.equal(load_and_go_on(model(), str(tmp_path), {}, lengths), found[0])


def test_a_rank_that_cannot_capture() -> None:
    expected = tokens_of(DynamicCache(config=model().config))
    for found, captured, refused in ranks().run(2, "cannot_capture", model_folder(), EXACT, 1):
        assert torch.equal(found[0], expected)
        assert captured == [0]
        assert "this rank cannot capture" in str(refused)
