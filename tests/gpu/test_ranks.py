"""Tensor-parallel models on GPUs: two ranks on two GPUs, over NCCL.

Tokens are those of DynamicCache in one process; where a cache approximates, those of SpinCache in one process.
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
from tests.support.memory import SMALL_ZONES
from tests.support.rank_cases import ON_GPU, last_logits, load_and_go_on, prompt_and_steps, sequences
from tests.support.ranks import RankPool, four_heads, rank_pool, whole_model
from tests.support.tuning import tuned
from tests.support.zoo import left_padded

TWO_GPUS = "needs two GPUs: NCCL takes one rank for each, and torch's collectives over gloo crash for tensors on a GPU"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason=TWO_GPUS)]

CALLS: list[dict[str, Any]] = [{}, {"num_beams": 3}]
EXACT: dict[str, Any] = {"budget": 1 << 20}
PAGED: dict[str, Any] = {**EXACT, **SMALL_ZONES, "gpu_memory": 400_000}
SPARSE: dict[str, Any] = {"method": "shadowkv", "budget": 16, **SMALL_ZONES}


@pytest.fixture(autouse=True)
def short_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.ranks.WATCHDOG_SECONDS", 90.0)


def ranks() -> RankPool:
    """Two ranks, each on its GPU."""
    return rank_pool("nccl", "cuda")


@functools.cache
def model() -> Any:
    """The model in this process, on a GPU."""
    return whole_model(four_heads()).cuda()


def tokens_of(cache: Any, **call: Any) -> torch.Tensor:
    """What `rank_cases.on_gpu` does, in this process."""
    ids, mask = left_padded([73, 58])
    return sequences(model(), cache, ids, 12, attention_mask=mask, **call)


@pytest.mark.parametrize(
    "options", [EXACT, PAGED, {**EXACT, "method": "shadowkv"}], ids=["resident", "paged", "shadowkv"]
)
def test_tokens_are_those_of_dynamic_cache(options: dict[str, Any]) -> None:
    for found, captured, refused in ranks().run(2, "on_gpu", four_heads(), options, CALLS):
        for call, tokens in zip(CALLS, found, strict=True):
            assert torch.equal(tokens, tokens_of(DynamicCache(config=model().config), **call)), call
        assert refused is None
        assert captured[0] == 1


@pytest.mark.parametrize("more", [{}, {"gpu_memory": 200_000}, {"gpu_memory": 200_000, "cpu_dtype": "int8"}], ids=str)
def test_what_approximates_is_that_of_one_process(more: dict[str, Any]) -> None:
    """In one process four heads have twice the memory of two."""
    one = {**SPARSE, **more, **({"gpu_memory": 400_000} if more else {})}
    with tuned(**ON_GPU):
        expected = tokens_of(SpinCache(model(), **one))
    for found, _, _ in ranks().run(2, "on_gpu", four_heads(), {**SPARSE, **more}, [{}]):
        assert torch.equal(found[0], expected)


@pytest.mark.parametrize(("place", "in_steps"), [("first batch", False), ("pages", False), ("pages", True)])
def test_a_rank_that_runs_out_of_memory(place: str, in_steps: bool) -> None:
    found = ranks().run(2, "out_of_memory", four_heads(), place, 0, in_steps, EXACT)
    expected = torch.stack(last_logits(model(), DynamicCache(config=model().config), prompt_and_steps()))
    assert [each[1] for each in found] == [False, True]
    assert found[0][0] == found[1][0]
    assert str(found[0][0]).startswith("CapacityError: pages and summaries")
    for _, _, (before, after), logits in found:
        assert before == after
        assert difference(logits, expected) < 1e-4


def test_one_process_loads_what_two_ranks_saved(tmp_path: Path) -> None:
    lengths = [93, 71]
    found = ranks().run(2, "saved", four_heads(), str(tmp_path), SPARSE, lengths)
    assert torch.equal(found[0], found[1])
    assert torch.equal(load_and_go_on(model(), str(tmp_path), {}, lengths), found[0])


def test_a_rank_that_cannot_capture() -> None:
    expected = tokens_of(DynamicCache(config=model().config))
    for found, captured, refused in ranks().run(2, "cannot_capture", four_heads(), EXACT, 1):
        assert torch.equal(found[0], expected)
        assert captured == [0]
        assert "this rank cannot capture" in str(refused)
