"""Stores for tests: with small blocks, one whose `keep` waits for the disk, and a gate that holds the thread that writes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from spin_hf import PromptStore
from spin_hf.persistence import background_writer

BLOCK = 8
Maker = Callable[..., PromptStore]


class StoredAtOnce(PromptStore):
    """A store that returns from `keep` when the prompt is on the disk."""

    def keep(self, cache: Any, ids: Tensor, mask: Tensor | None) -> None:
        super().keep(cache, ids, mask)
        assert self.wait(60)


def store_maker(kind: str, folder: Path) -> Maker:
    """A function that makes stores, with options, in "memory" or on "disk", there in one folder.

    Stores on disk return from `keep` when the prompt is written.
    """

    def made(**options: Any) -> PromptStore:
        if kind == "memory":
            return PromptStore(block_tokens=BLOCK, **options)
        return StoredAtOnce(folder / "store", block_tokens=BLOCK, **options)

    return made


class Gate:
    """Holds the threads that write prompts until it is opened.

    Attributes:
        lengths: tokens of each prompt whose writing has begun.
        most_at_once: prompts that were being written at the same time.
    """

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.most_at_once = self._now = 0
        self._opened, self._begun = threading.Event(), threading.Semaphore(0)

    def open(self) -> None:
        """Let all of them go on."""
        self._opened.set()

    def wait_for_a_write(self) -> None:
        """Wait until another prompt is being written."""
        assert self._begun.acquire(timeout=60), "no prompt is being written"

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> Gate:
        """Stand in front of `save`."""
        save = background_writer.save

        def held(*args: Any) -> None:
            self.lengths.append(args[5])
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            self._begun.release()
            try:
                assert self._opened.wait(60), "the gate was not opened"
                save(*args)
            finally:
                self._now -= 1

        monkeypatch.setattr(background_writer, "save", held)
        return self
