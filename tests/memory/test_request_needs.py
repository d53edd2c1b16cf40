"""What one sequence needs, against `plan`; a cap divided among sequences; and free host memory."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest

import spin_hf
from spin_hf import SpinCache
from spin_hf.config import SpinOptions
from spin_hf.memory.cap_division import set_cap, shares
from spin_hf.memory.host_memory import free_host_memory
from spin_hf.memory.request_needs import NeedsByLength, RequestNeeds
from tests.support.inspection import forward_of, state_of
from tests.support.zoo import build_model, random_tokens

OPTIONS: dict[str, Any] = dict(budget=64, recent_window=16)


@pytest.mark.parametrize("method", ["shadowkv", "fitted"])
@pytest.mark.parametrize("tokens", [100, 1000, 5000])
def test_needs_are_those_of_a_plan(method: str, tokens: int) -> None:
    model = build_model("llama")
    bound = state_of(SpinCache(model, method)).method
    needs = NeedsByLength(model, bound, SpinOptions.parse(**OPTIONS)).of(tokens)

    def planned(gpu_memory: int) -> spin_hf.MemoryPlan:
        return spin_hf.plan(model, method=method, context_length=tokens, gpu_memory=gpu_memory, **OPTIONS)

    assert planned(needs.mandatory).fits
    assert planned(needs.minimum).fits
    assert planned(needs.resident).page_frames == 0
    if needs.mandatory < needs.resident:
        with_frames = planned(needs.resident - 1)
        assert with_frames.page_frames > 0
        assert with_frames.cpu_bytes == needs.host
        assert planned(needs.mandatory).page_frames < (planned(needs.minimum).page_frames or 1 << 30)
    assert needs.mandatory <= needs.minimum <= needs.resident


def test_needs_grow_with_the_tokens() -> None:
    model = build_model("llama")
    by_length = NeedsByLength(model, state_of(SpinCache(model, "shadowkv")).method, SpinOptions.parse(**OPTIONS))
    found = [by_length.of(tokens) for tokens in (100, 300, 1000, 4000)]
    for smaller, larger in itertools.pairwise(found):
        assert smaller.mandatory <= larger.mandatory
        assert smaller.resident < larger.resident


def test_shares_are_the_minimum_and_a_part_of_the_rest() -> None:
    draw = random.Random(0)
    for _ in range(200):
        needs = [RequestNeeds(0, least, least + draw.randint(0, 100), 0) for least in draw.choices(range(1, 50), k=5)]
        cap = draw.randint(5, 800)
        found = shares(cap, needs)
        least = sum(each.minimum for each in needs)
        assert sum(found) <= cap + len(needs), "a cap of 0 bytes is none"
        if least <= cap:
            assert all(each.minimum <= share <= each.resident for share, each in zip(found, needs, strict=True))
        if cap >= sum(each.resident for each in needs):
            assert found == [each.resident for each in needs]


def test_a_smaller_cap_takes_frames_and_leaves_the_tokens() -> None:
    model, prompt = build_model("llama"), random_tokens(1, 600)
    cache, other = (SpinCache(model, "shadowkv", gpu_memory="250KB", **OPTIONS) for _ in range(2))
    for each in (cache, other):
        model.generate(prompt, past_key_values=each, max_new_tokens=2, do_sample=False)
    before = cache.stats()
    assert before.buffer_frames > 0
    set_cap(forward_of(cache).gpu, 120_000)
    assert cache.stats().buffer_frames < before.buffer_frames
    cache.check_integrity()
    assert cache.get_seq_length() == other.get_seq_length()


@pytest.mark.parametrize(
    ("limit", "expected"), [(None, 4096 << 10), ("max", 4096 << 10), ("2000000", 2_000_000 - 700_000)]
)
def test_free_host_memory(tmp_path: Path, limit: str | None, expected: int) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9999 kB\nMemAvailable:    4096 kB\n")
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    if limit is not None:
        (group / "memory.max").write_text(limit)
    (group / "memory.current").write_text("1000000")
    (group / "memory.stat").write_text("anon 5\ninactive_file 300000\n")
    assert free_host_memory(tmp_path) == expected
    assert free_host_memory(tmp_path / "elsewhere") is None
