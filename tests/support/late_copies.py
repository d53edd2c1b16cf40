"""A stand-in for a GPU's streams that copies late.

What a copy reads is looked at when the copy is waited for, not when it is started. So a buffer that is filled too early, and a
copy that nobody waits for, give other numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

from spin_hf.persistence import contents, fills, opened, shards, staging


class LateStream:
    """A `CopyStream` whose copies are made when they are waited for."""

    made: list[LateStream] = []

    def __init__(self, device: torch.device) -> None:
        self.waiting: list[Callable[[], object]] = []
        self.copies = self.done = 0
        LateStream.made.append(self)

    def current(self) -> AbstractContextManager[object]:
        return nullcontext()

    def copy(self, place: Tensor, content: Tensor) -> None:
        self.waiting.append(lambda: place.copy_(content))
        self.copies += 1

    def fetch(self, place: Tensor, made: Callable[[], Tensor]) -> None:
        self.waiting.append(lambda: place.copy_(made()))

    def event(self) -> LateEvent:
        return LateEvent(self)

    def wait(self, until: int | None = None) -> None:
        """Do what is waiting, up to number `until`."""
        while self.waiting and (until is None or self.done < until):
            self.waiting.pop(0)()
            self.done += 1


class LateEvent:
    """A `CopyEvent` of a `LateStream`."""

    def __init__(self, stream: LateStream) -> None:
        self.stream, self.number = stream, 0

    def record(self) -> None:
        self.number = self.stream.done + len(self.stream.waiting)

    def wait(self) -> None:
        self.stream.wait(self.number)


def copies_are_late(
    monkeypatch: pytest.MonkeyPatch, piece_bytes: int = 4096, block_bytes: int = 2048
) -> list[LateStream]:  # fmt: skip
    """All pages go through buffers and streams that copy late, in small blocks, pieces and units. Returns the streams made."""
    monkeypatch.setattr(LateStream, "made", [])
    monkeypatch.setattr(staging, "CopyStream", LateStream)
    monkeypatch.setattr(staging, "has_streams", lambda device: True)
    monkeypatch.setattr(staging, "_allocate", lambda num_bytes, locks: torch.empty(num_bytes, dtype=torch.uint8))
    for module in (contents, fills):
        monkeypatch.setattr(module, "in_host_memory", lambda device: False)
    small_blocks(monkeypatch, piece_bytes, block_bytes)
    return LateStream.made


def small_blocks(monkeypatch: pytest.MonkeyPatch, piece_bytes: int = 4096, block_bytes: int = 2048) -> None:
    """A small cache has many blocks, pieces and units."""
    monkeypatch.setattr(shards, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(staging, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(opened, "_CHECKED_BYTES", max(512, block_bytes // 512 * 512))
    monkeypatch.setattr(opened, "_UNIT_BYTES", 3 * piece_bytes)
