"""Saved caches: small ones to save, the check that a restored one goes on as the saved one, and changes to their files."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spin_hf import SpinCache
from tests.support.inspection import state_of
from tests.support.memory import SMALL_ZONES
from tests.support.zoo import left_padded, random_tokens, subject_model

SPARSE: dict[str, Any] = {"budget": 16, **SMALL_ZONES}
JSON = "spin_cache.json"


@torch.no_grad()
def read(model: Any, cache: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    """Logits of `ids` with a cache."""
    logits: Tensor = model(ids, past_key_values=cache, **kwargs).logits
    return logits


def prefilled(family: str, *, padded: bool = False, tokens: int = 70, steps: int = 3, **options: Any) -> SpinCache:
    """A cache that has read a prompt of two sequences and some more tokens, one at a time."""
    model = subject_model(family)
    cache = SpinCache(model, **{**SPARSE, **options})
    ids, mask = left_padded([tokens, tokens - 17]) if padded else (random_tokens(2, tokens), torch.ones(2, tokens))
    mask = mask.long()
    read(model, cache, ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    for step in range(steps):
        advance(model, cache, step)
    return cache


def advance(model: Any, cache: Any, seed: int) -> Tensor:
    """Logits of one more token of every sequence. Padding held stays padding."""
    length = cache.get_seq_length()
    valid = state_of(cache).sequences.mask.valid if cache.paged_layers else None
    batch = rows_of(cache)
    mask = torch.ones(batch, length + 1, dtype=torch.long)
    if valid is not None:
        mask[:, :length] = valid.long()
    ids = random_tokens(batch, 1, seed=100 + seed)
    extra = {} if valid is None else {"position_ids": (mask.cumsum(1) - 1)[:, -1:]}
    return read(model, cache, ids, attention_mask=mask, **extra)


def rows_of(cache: Any) -> int:
    """Number of sequences held."""
    for layer in cache.layers:
        keys = layer.keys if hasattr(layer, "keys") else None
        if keys is not None and keys.dim() == 4:
            return len(keys)
    raise AssertionError("an empty cache")


def assert_goes_on(model: Any, saved: Any, restored: Any, *, exact: bool = True, steps: int = 8) -> None:
    """Both caches give the same logits for the same tokens, and are whole."""
    restored.check_integrity()
    assert restored.get_seq_length() == saved.get_seq_length()
    tolerance = 0.0 if exact else 1e-5
    for step in range(steps):
        ours, theirs = advance(model, restored, step), advance(model, saved, step)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    restored.check_integrity()


def read_json(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / JSON).read_text())
    return found


def write_json(folder: Path, content: dict[str, Any], *, checksum: bool = True) -> None:
    """Write the JSON, with a checksum that belongs to it."""
    content = copy.deepcopy(content)
    if checksum:
        content.pop("checksum", None)
        plain = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
        content["checksum"] = hashlib.sha256(plain).hexdigest()
    (folder / JSON).write_text(json.dumps(content))


def change_json(folder: Path, change: Callable[[dict[str, Any]], Any], *, checksum: bool = True) -> None:
    """Change the JSON in place; its checksum then belongs to it."""
    content = read_json(folder)
    change(content)
    write_json(folder, content, checksum=checksum)


def shards_of(folder: Path) -> list[Path]:
    """The shards that the JSON names, in order."""
    return [folder / shard["name"] for shard in read_json(folder)["shards"]]
