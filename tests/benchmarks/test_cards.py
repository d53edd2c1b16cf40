"""`cards.py`: what it calls the longest prompt fits, and the next longer one does not."""

from __future__ import annotations

import pytest

from benchmarks.memory import cards

T4, LARGER = cards.CARDS
MODEL = "qwen3-0.6b"


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("method", ["fitted", "shadowkv"])
def test_the_longest_prompt(method: str, on_gpu: bool) -> None:
    free, host = 3 << 30, 4 << 30
    found = cards.longest(MODEL, method, free, host, on_gpu)
    assert found
    for tokens, expected in ((found, True), (found + cards.STEP, False)):
        made = cards.planned(MODEL, method, tokens, free)
        assert cards.fits(made, free, host, on_gpu) == expected
    assert bool(cards.planned(MODEL, method, found, free).page_frames) != on_gpu


def test_rows() -> None:
    small, large = (cards.row(card, MODEL, "16-bit weights", "fitted") for card in (T4, LARGER))
    assert 0 < small["tokens_on_gpu"] < small["tokens_with_host"] < large["tokens_with_host"]
    none = cards.row(T4, "llama-8b", "16-bit weights", "fitted")
    assert none["why"]
    assert len(cards.lines([small, large, none])) == 5


def test_weights() -> None:
    whole, coded = (cards.weight_bytes(MODEL, bits) for bits in (16.0, 4.5))
    embedding = 151936 * 1024 * 2
    assert coded - embedding == pytest.approx((whole - embedding) * 4.5 / 16, rel=0.01)
