"""Descriptors of layers: those that have changed are uploaded together, and the others are not."""

from __future__ import annotations

import os
import sys
from copy import copy

import pytest
import torch

from spin_hf.backends import descriptors
from spin_hf.storage import chunked_array
from tests.support.cache_driver import CacheDriver, RandomKV, Shape
from tests.support.interpreted_kernels import interpret_kernels

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu runs the kernels themselves"),
]

SHAPE = Shape(layers=4, kv_heads=1, group=1)
PROMPT = 70


def test_a_fork_uploads_all_layers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    interpret_kernels(monkeypatch)
    uploads: list[int] = []
    tables: list[int] = []
    upload, zeros = descriptors._upload, chunked_array._zeros

    def counted(fields: list[object], descriptor: torch.Tensor) -> None:
        if descriptor.dim() == 2:
            uploads.append(len(fields))
        upload(fields, descriptor)

    def made(shape: tuple[int, int], **options: object) -> torch.Tensor:
        tables.append(shape[0])
        return zeros(shape, **options)

    monkeypatch.setattr(descriptors, "_upload", counted)
    monkeypatch.setattr(chunked_array, "_zeros", made)
    driver = CacheDriver(SHAPE, budget=16, recent_window=8)
    kv = RandomKV.random(SHAPE, 1, PROMPT + 3, seed=0)
    driver.step(kv, 0, PROMPT)
    assert uploads == [1] * 4, "layers of a prompt get their pages one after the other"
    each = tables[0]
    assert tables == [each] * 4
    driver.step(kv, PROMPT, PROMPT + 1)
    uploads.clear()
    tables.clear()
    fork = copy(driver)
    fork.cache = driver.cache.fork()
    found = fork.step(kv, PROMPT + 1, PROMPT + 2)
    assert uploads == [4]
    assert tables == [4 * each]
    uploads.clear()
    expected = driver.step(kv, PROMPT + 1, PROMPT + 2)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    uploads.clear()
    fork.step(kv, PROMPT + 2, PROMPT + 3)
    assert not uploads
