"""Stores with small blocks, in memory or in a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from spin_hf import PromptStore

BLOCK = 8
Maker = Callable[..., PromptStore]


def store_maker(kind: str, folder: Path) -> Maker:
    """A function that makes stores, with options, in "memory" or on "disk", there in one folder."""

    def made(**options: Any) -> PromptStore:
        if kind == "memory":
            return PromptStore(block_tokens=BLOCK, **options)
        return PromptStore(folder / "store", block_tokens=BLOCK, **options)

    return made
