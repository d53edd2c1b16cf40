"""A stand-in for a GPU's streams that copies late.

What a copy reads is looked at when the copy is waited for, not when it is started. So a buffer that is filled too early, and a
copy that nobody waits for, give other numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spin_hf.persistence import contents, fills, shards, staging


class LateStream:
    """A `CopyStream` whose copies are made when they are waited for."""

    made: list[LateStream] = []

    def __init__(self, device: torch.device) -> None:
        self.waiting: list[list[tuple[Tensor, Tensor]]] = []
        self.copies = 0
        LateStream.made.append(self)

    def copy(self, pairs: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
        self.waiting.append(pairs)
        self.copies += 1

        def wait() -> None:
            while any(each is pairs for each in self.waiting):
                self._next()

        return wait

    def wait(self) -> None:
        while self.waiting:
            self._next()

    def _next(self) -> None:
        for place, content in self.waiting.pop(0):
            place.copy_(content)


def copies_are_late(monkeypatch: pytest.MonkeyPatch, piece_bytes: int = 4096) -> list[LateStream]:
    """All pages go through buffers and streams that copy late, in small pieces. Returns the streams that are made."""
    monkeypatch.setattr(LateStream, "made", [])
    monkeypatch.setattr(staging, "CopyStream", LateStream)
    monkeypatch.setattr(staging, "has_streams", lambda device: True)
    monkeypatch.setattr(staging, "_allocate", lambda num_bytes, locks: torch.empty(num_bytes, dtype=torch.uint8))
    for module in (contents, fills):
        monkeypatch.setattr(module, "in_host_memory", lambda device: False)
    monkeypatch.setattr(shards, "PIECE_BYTES", piece_bytes)
    return LateStream.made
