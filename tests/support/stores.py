"""Stores for tests: with small blocks, one whose `keep` waits for the disk, and a gate that holds the thread that writes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from spin_hf import PromptStore, SpinCache
from spin_hf.persistence import background_writer
from tests.support.answers import answer, assert_fresh
from tests.support.zoo import build_model

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


def restored(folder: Path, ids: Tensor, **options: Any) -> int:
    """Tokens that a new store of the folder restores for a prompt. The answer is that of an empty cache."""
    model, store = build_model("llama"), StoredAtOnce(folder, block_tokens=BLOCK)
    assert_fresh(model, ids, SpinCache(model, budget=1 << 20, store=store, **options))
    return store.stats().reused_tokens


def folders(directory: Path) -> list[str]:
    return [folder.name for folder in (directory / "entries").iterdir()]


class Gate:
    """Holds the threads that write prompts until it is opened.

    Attributes:
        lengths: tokens of each prompt whose writing has begun.
        most_at_once: prompts that were being written at the same time.
    """

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.most_at_once = self._now = 0
        self._opened: set[int | None] = set()
        self._changed, self._begun = threading.Condition(), threading.Semaphore(0)

    def open(self, length: int | None = None) -> None:
        """Let prompts of a length go on, or all of them."""
        with self._changed:
            self._opened.add(length)
            self._changed.notify_all()

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
                with self._changed:
                    is_open = self._changed.wait_for(lambda: not self._opened.isdisjoint((None, args[5])), 60)
                assert is_open, "the gate was not opened"
                save(*args)
            finally:
                self._now -= 1

        monkeypatch.setattr(background_writer, "save", held)
        return self


def read(store: PromptStore, ids: Tensor, model: Any = None, **options: Any) -> SpinCache:
    """A cache that `generate` has filled with a prompt and five tokens."""
    model = build_model("llama") if model is None else model
    cache = SpinCache(model, budget=1 << 20, store=store, **options)
    answer(model, ids, cache)
    return cache
