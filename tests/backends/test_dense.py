"""Pieces of earlier tokens that few queries attend to: fewer and larger ones, where they are read as they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from spin_hf.backends import dense
from spin_hf.kernels import reads_in_place
from spin_hf.storage.page_stream import TokenStream, gather_all
from tests.support.cache_driver import CacheDriver, RandomKV, Shape
from tests.support.tuning import tune

SHAPE = Shape(layers=1)
LENGTH = 1300
"""Six segments of 256 tokens."""


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of pieces of each stream, 0 if all tokens are gathered at once."""
    found: list[int] = []

    class Noted(TokenStream):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            found.append(len(self.ranges))

    def noted(*args: Any) -> Any:
        gathered = gather_all(*args)
        if gathered is not None:
            found.append(0)
        return gathered

    monkeypatch.setattr(dense, "TokenStream", Noted)
    monkeypatch.setattr(dense, "gather_all", noted)
    return found


def question(
    pieces: list[int], tokens: int, rows: int = 1, padded: bool = False, shape: Shape = SHAPE, **options: Any
) -> tuple[int, torch.Tensor]:
    """Pieces, and output, of a forward of some tokens behind LENGTH tokens."""
    kv = RandomKV.random(shape, rows, LENGTH + tokens, seed=0)
    valid = torch.ones((rows, LENGTH + tokens), dtype=torch.bool)
    valid[0, : 40 if padded else 0] = False
    driver = CacheDriver(shape, **options)
    driver.step(kv, 0, LENGTH, valid[:, :LENGTH])
    pieces.clear()
    (out,) = driver.step(kv, LENGTH, LENGTH + tokens, valid)
    return pieces[-1], out


def test_few_queries_read_large_pieces(pieces: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    segment = 256 * 2 * 16 * 4
    whole = question(pieces, 256)
    assert pieces == [0], "earlier and new tokens are one piece"
    tune(monkeypatch, piece_bytes=segment * 7 // 5 + 1)
    assert question(pieces, 256)[0] == 0, "seven segments"
    tune(monkeypatch, piece_bytes=segment * 7 // 5)
    assert question(pieces, 256)[0] == 2
    tune(monkeypatch, piece_bytes=segment)
    assert question(pieces, 257)[0] == 6
    found = question(pieces, 256)
    assert found[0] == 2
    torch.testing.assert_close(found[1], whole[1])
    tune(monkeypatch, piece_bytes=2 * segment)
    assert question(pieces, 129, rows=2)[0] == 6
    assert question(pieces, 128, rows=2)[0] == 2
    assert question(pieces, 64, rows=1)[0] == 0
    assert question(pieces, 64, rows=2, padded=True)[0] == 6, "padding is left out in a copy"
    tune(monkeypatch, piece_bytes=1 << 30)
    expected = question(pieces, 64, gpu_memory="60kB", cpu_dtype="int8")
    assert pieces == [1], "of earlier tokens, as pages are int8"
    monkeypatch.setattr(dense, "_whole", lambda call, store: None)
    torch.testing.assert_close(
        question(pieces, 64, gpu_memory="60kB", cpu_dtype="int8")[1], expected[1], rtol=0, atol=0
    )
    torch.testing.assert_close(question(pieces, 256)[1], whole[1])


@pytest.mark.parametrize(
    ("shape", "options"),
    [(SHAPE, {"softcap": 5.0}), (replace(SHAPE, value_dim=16), {}), (replace(SHAPE, key_dim=12, value_dim=12), {})],
    ids=["softcap", "sizes", "odd sizes"],
)
def test_what_no_fused_kernel_reads_in_place(
    shape: Shape, options: dict[str, Any], pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(monkeypatch, piece_bytes=256 * 2 * (shape.key_dim + shape.value_dim) * 4)
    assert question(pieces, 64, shape=shape, **options)[0] == 6


def test_reads_in_place() -> None:
    assert reads_in_place(128, 128, torch.bfloat16)
    assert reads_in_place(64, 64, torch.float32)
    for key_dim, value_dim, dtype in (
        (128, 64, torch.half),
        (12, 12, torch.half),
        (264, 264, torch.half),
        (8, 8, torch.double),
    ):
        assert not reads_in_place(key_dim, value_dim, dtype)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert not reads_in_place(128, 128, torch.bfloat16)
