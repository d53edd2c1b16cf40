"""Padding that appears during a conversation: optimistic replays are rolled back, or not launched."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from spin_hf import SpinCache
from spin_hf.graph.replay_check import ReplayCheck
from spin_hf.indexing import padding_change
from tests.support.graph_recorder import FakeRecorder, capture_on_cpu
from tests.support.stale_graph import OPTIONS, assert_same, small_model

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu captures graphs"),
]


def _left(mask: Tensor) -> None:
    mask[0, :11] = 0


def _middle(mask: Tensor) -> None:
    mask[1, 20:23] = 0


def _new_token(mask: Tensor) -> None:
    mask[0, -1] = 0


def _real_again(mask: Tensor) -> None:
    mask[0, 5:11] = 1


@torch.no_grad()
def _padded_from(
    source: str, paint: Callable[[Tensor], None], prompt: int, short: int = 0, padded: bool = False
) -> tuple[Tensor, list[int]]:
    """Three tokens with a full mask, or one of a prompt that is padded, then three with padding that was not there before."""
    model = small_model()
    ids = torch.randint(3, 100, (2, prompt + 6), generator=torch.Generator().manual_seed(1))
    cache = SpinCache(model if source == "model" else model.config, **OPTIONS)
    mask = torch.ones((2, prompt), dtype=torch.int64)
    if padded:
        _left(mask)
    logits, replays = [model(ids[:, :prompt], past_key_values=cache, attention_mask=mask).logits[:, -1:]], []
    for place in range(prompt, prompt + 6):
        before = FakeRecorder.replays
        mask = torch.cat([mask, mask.new_ones((2, 1))], 1)
        if place == prompt + 3:
            paint(mask)
        given = mask[:, : mask.shape[1] - short] if place == prompt + 3 else mask
        positions = torch.full((2, 1), place)
        options = {"attention_mask": given, "position_ids": positions}
        logits.append(model(ids[:, place : place + 1], past_key_values=cache, **options).logits)
        replays.append(FakeRecorder.replays - before)
        cache.check_integrity()
    return torch.cat(logits, 1), replays


@pytest.mark.sweep
@pytest.mark.parametrize("prompt", [38, 36], ids=["inside a page", "fills a page"])
@pytest.mark.parametrize("paint", [_left, _middle, _new_token])
def test_padding_that_appears_later(paint: Any, prompt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = _padded_from("config", paint, prompt)
    capture_on_cpu(monkeypatch)
    actual, replays = _padded_from("model", paint, prompt)
    assert_same(actual, expected)
    assert replays == [0, 1, 1, 1, 1, 1]  # the fourth is rolled back, and eager; the next has a graph for padding


@pytest.mark.sweep(keep=[0])
@pytest.mark.parametrize("paint", [_real_again, _middle, _new_token])
def test_padding_that_changes_later(paint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = _padded_from("config", paint, 38, padded=True)
    capture_on_cpu(monkeypatch)
    actual, replays = _padded_from("model", paint, 38, padded=True)
    assert_same(actual, expected)
    assert replays == [0, 1, 1, 2, 1, 1]  # the fourth is rolled back, and replayed with what is padding now


def test_padding_that_stays_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a step is captured, the mask is compared after the launch only."""
    expected, _ = _padded_from("config", lambda mask: None, 38, padded=True)
    capture_on_cpu(monkeypatch)
    checked, take = list[int](), padding_change.take

    def watched(state: Any, mask: Tensor | None) -> Tensor | None:
        checked.append(state.committed)
        return take(state, mask)

    monkeypatch.setattr(padding_change, "take", watched)
    actual, replays = _padded_from("model", lambda mask: None, 38, padded=True)
    assert_same(actual, expected)
    assert replays == [0, 1, 1, 1, 1, 1]
    assert checked == [38, 39]  # eager, and captured


def test_a_mask_that_is_too_short_shows_it_before_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = _padded_from("config", lambda mask: None, 38, short=1)
    capture_on_cpu(monkeypatch)
    actual, replays = _padded_from("model", lambda mask: None, 38, short=1)
    assert_same(actual, expected)
    assert replays[3] == 0


def test_a_mask_longer_than_the_context_is_looked_at_as_far_as_that() -> None:
    verification, unchanged = ReplayCheck(), SimpleNamespace(unchanged=lambda: True)
    mask = torch.ones((2, 9), dtype=torch.int64)
    mask[0, 7] = 0
    for length, holds in ((7, True), (8, False), (9, False)):
        assert verification.start(mask, length)
        assert verification.passed(unchanged) == holds  # type: ignore[arg-type]
    assert not verification.start(mask, 10)
    assert verification.passed(unchanged)  # type: ignore[arg-type]  # nothing is assumed any more
