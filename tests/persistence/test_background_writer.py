"""Prompts are written to the disk behind the first token: what waits, what is dropped, and what is left of it."""

from __future__ import annotations

import copy
import gc
import logging
import threading
import weakref
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from spin_hf import PromptStore, SpinCache
from spin_hf.memory import other_caches
from spin_hf.memory.gpu_memory import GpuMemory
from spin_hf.persistence import writer
from spin_hf.persistence.contents import Contents
from spin_hf.persistence.prompt_identity import common_length
from tests.support.answers import answer, assert_fresh
from tests.support.inspection import forward_of
from tests.support.memory import SMALL_ZONES
from tests.support.stores import BLOCK, Gate, StoredAtOnce, folders, read, restored
from tests.support.zoo import build_model, random_tokens


def test_the_first_token_does_not_wait(gate: Gate, tmp_path: Path) -> None:
    store, ids = PromptStore(tmp_path, block_tokens=BLOCK), random_tokens(1, 60)
    read(store, ids)
    gate.wait_for_a_write()
    assert not store.wait(0.05)
    assert store.stats().entries == 0
    gate.open()
    assert store.wait()
    assert store.stats().entries == 1
    assert restored(tmp_path, ids) == 59


def test_nothing_to_wait_for(tmp_path: Path) -> None:
    assert PromptStore(tmp_path).wait()
    assert PromptStore().wait(0)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
def test_what_is_written_is_the_prompt(family: str, gate: Gate, tmp_path: Path) -> None:
    """The cache goes on, is cropped where it can be, and is filled with another text meanwhile."""
    model, store, ids = build_model(family), PromptStore(tmp_path, block_tokens=BLOCK), random_tokens(1, 60)
    cache = read(store, ids, model)
    gate.wait_for_a_write()
    assert_fresh(model, torch.cat([ids[:, :25], random_tokens(1, 40, seed=5)], 1), cache)
    del cache
    gate.open()
    assert store.wait(60)
    later = StoredAtOnce(tmp_path, block_tokens=BLOCK)
    longer = torch.cat([ids, random_tokens(1, 5, seed=1)], 1)
    assert_fresh(model, longer, SpinCache(model, budget=1 << 20, store=later))
    assert later.stats().reused_tokens == 60


@pytest.mark.parametrize("method", ["shadowkv", "retroinfer"])
def test_pages_in_either_tier(method: str, gate: Gate, tmp_path: Path) -> None:
    model, ids = build_model("llama"), random_tokens(1, 200)
    options: dict[str, Any] = dict(budget=24, gpu_memory=200_000, **SMALL_ZONES)
    store = PromptStore(tmp_path, block_tokens=BLOCK)
    _, pending = (answer(model, ids, SpinCache(model, method, store=store, **options)).sequences for _ in range(2))
    assert store.stats().reused_tokens == 199
    gate.open()
    assert store.wait(60)
    other = StoredAtOnce(tmp_path, block_tokens=BLOCK)
    from_disk = answer(model, ids, SpinCache(model, method, store=other, **options)).sequences
    assert other.stats().reused_tokens == 199
    assert torch.equal(pending, from_disk)


@pytest.mark.parametrize("is_written", [True, False], ids=["being written", "waiting"])
def test_a_pending_prompt_is_restored(
    is_written: bool, gate: Gate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, store, ids = build_model("llama"), PromptStore(tmp_path, block_tokens=BLOCK), random_tokens(1, 60)
    if not is_written:
        read(store, random_tokens(1, 60, seed=3), model)
        gate.wait_for_a_write()
    read(store, ids, model)
    if is_written:
        gate.wait_for_a_write()
    for question in (1, 2):
        cache = SpinCache(model, budget=1 << 20, store=store)
        with caplog.at_level(logging.INFO, "spin_hf"):
            assert_fresh(model, torch.cat([ids, random_tokens(1, 5, seed=question)], 1), cache)
        assert cache.stats().reused_tokens == 60
    assert "60 of 65 tokens of the prompt restored from memory" in caplog.text
    for other in (SpinCache(model, "shadowkv", store=store), SpinCache(copy.deepcopy(model), store=store)):
        store.restore(other, ids, None)
        assert not other.get_seq_length(), "of another method or model object"
    gate.open()
    assert store.wait(60)
    assert restored(tmp_path, ids) == 59


def test_a_prompt_that_a_later_one_covers_is_not_written(gate: Gate, tmp_path: Path) -> None:
    store, ids = PromptStore(tmp_path, block_tokens=BLOCK), random_tokens(1, 90)
    read(store, random_tokens(1, 70, seed=3))
    gate.wait_for_a_write()
    read(store, ids[:, :60])
    read(store, ids)
    read(store, torch.cat([ids, random_tokens(1, 9, seed=1)], 1))  # few new tokens
    gate.open()
    assert store.wait(60)
    assert gate.lengths == [70, 90]
    assert store.stats().entries == len(folders(tmp_path)) == 2
    assert restored(tmp_path, ids) == 89


def test_a_prompt_that_is_being_written_is_replaced(gate: Gate, tmp_path: Path) -> None:
    store, ids = PromptStore(tmp_path, block_tokens=BLOCK), random_tokens(1, 90)
    read(store, ids[:, :60])
    gate.wait_for_a_write()
    read(store, ids)
    gate.open()
    assert store.wait(60)
    assert gate.lengths == [60, 90]
    assert store.stats().entries == len(folders(tmp_path)) == 1
    assert restored(tmp_path, ids) == 89


def test_what_another_process_has_stored_meanwhile_is_not_written(gate: Gate, tmp_path: Path) -> None:
    ours, theirs = (PromptStore(tmp_path, block_tokens=BLOCK) for _ in range(2))
    read(ours, random_tokens(1, 70, seed=3))
    gate.wait_for_a_write()
    read(ours, random_tokens(1, 60))
    read(theirs, random_tokens(1, 60))
    gate.wait_for_a_write()
    gate.open(60)
    assert theirs.wait(60)
    gate.open()
    assert ours.wait(60)
    assert gate.lengths == [70, 60]
    assert ours.stats().entries == len(folders(tmp_path)) == 2


def test_two_processes_that_write_the_same_prompt(gate: Gate, tmp_path: Path) -> None:
    stores = [PromptStore(tmp_path, block_tokens=BLOCK) for _ in range(2)]
    for length, store in zip((60, 61), stores, strict=True):
        read(store, random_tokens(1, 61)[:, :length])
        gate.wait_for_a_write()
    gate.open(61)
    assert stores[1].wait(60)
    gate.open()
    assert stores[0].wait(60)
    assert gate.lengths == [60, 61]
    assert stores[0].stats().entries == len(folders(tmp_path)) == 1


def test_few_prompts_wait(gate: Gate, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, prompts = PromptStore(tmp_path, block_tokens=BLOCK), [random_tokens(1, 60 + n, seed=n) for n in range(4)]
    forks = []
    with caplog.at_level(logging.INFO, "spin_hf"):
        for number, ids in enumerate(prompts):
            assert "may wait for the disk" not in caplog.text
            read(store, ids)
            if not number:
                gate.wait_for_a_write()
            forks.append(weakref.ref(store._writer.pending()[-1].cache))
    assert "at most 2 may wait for the disk" in caplog.text
    assert [fork() is None for fork in forks] == [False, True, False, False]
    gate.open()
    assert store.wait(60)
    assert gate.lengths == [60, 62, 63]
    assert not any(fork() for fork in forks), "memory is freed with the last byte"


def test_the_model_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While files are written it may be deleted, and its forward is its own again with the user's last cache."""
    begun, opened, written = threading.Event(), threading.Event(), writer._written

    def held(*args: Any) -> Any:
        begun.set()
        assert opened.wait(60)
        return written(*args)

    monkeypatch.setattr(writer, "_written", held)
    model, store = copy.deepcopy(build_model("llama")), PromptStore(tmp_path, block_tokens=BLOCK)
    read(store, random_tokens(1, 60), model)
    assert begun.wait(60)
    gc.collect()
    assert "forward" not in model.__dict__
    assert "_prefill" not in model.__dict__
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    opened.set()
    assert store.wait(60)
    assert restored(tmp_path, random_tokens(1, 60)) == 59


def test_a_store_without_references_finishes(gate: Gate, tmp_path: Path) -> None:
    store = PromptStore(tmp_path, block_tokens=BLOCK)
    read(store, random_tokens(1, 60))
    gate.wait_for_a_write()
    thread, alive = store._writer._thread, weakref.ref(store)
    assert thread is not None
    assert thread.daemon
    del store
    gate.open()
    thread.join(60)
    gc.collect()
    assert alive() is None
    assert restored(tmp_path, random_tokens(1, 60)) == 59


def test_clear_drops_what_is_pending(gate: Gate, tmp_path: Path) -> None:
    store, ids = PromptStore(tmp_path, block_tokens=BLOCK), random_tokens(1, 60)
    read(store, ids)
    gate.wait_for_a_write()
    read(store, random_tokens(1, 61, seed=1))
    store.clear()
    empty = SpinCache(build_model("llama"), budget=1 << 20, store=store)
    store.restore(empty, ids, None)
    assert not empty.get_seq_length()
    gate.open()
    assert store.wait(60)
    assert gate.lengths == [60]
    assert store.stats().entries == 0
    assert not folders(tmp_path)
    read(store, ids)
    assert store.wait(60)
    assert store.stats().entries == 1


def test_clear_stops_what_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pieces, begun, opened = Contents.pieces, threading.Event(), threading.Event()
    made = []

    def held(self: Contents, *args: Any) -> Iterator[list[memoryview]]:
        for piece in pieces(self, *args):
            made.append(len(piece))
            begun.set()
            assert opened.wait(60)
            yield piece

    monkeypatch.setattr(Contents, "pieces", held)
    store = PromptStore(tmp_path, block_tokens=BLOCK)
    read(store, random_tokens(1, 60))
    assert begun.wait(60)
    store.clear()
    opened.set()
    assert store.wait(60)
    assert len(made) == 1, "it stops at the next piece"
    assert not folders(tmp_path)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("modes", [torch.inference_mode, torch.enable_grad])
def test_modes_of_the_caller(modes: Any, tmp_path: Path) -> None:
    store, ids = PromptStore(tmp_path, block_tokens=BLOCK), random_tokens(1, 60)
    with modes():
        read(store, ids)
    assert store.wait(60)
    assert restored(tmp_path, ids) == 59


def test_threads(gate: Gate, tmp_path: Path) -> None:
    """Threads with models of their own fill a store; one prompt is written at a time."""
    store, errors = PromptStore(tmp_path, block_tokens=BLOCK), list[BaseException]()
    models = [copy.deepcopy(build_model("llama")) for _ in range(3)]
    gate.open()

    def run(number: int) -> None:
        try:
            for turn in range(4):
                cache = SpinCache(models[number], budget=1 << 20, store=store)
                assert_fresh(models[number], random_tokens(1, 60, seed=10 * number + turn), cache)
                assert store.wait(60)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert store.wait(60)
    assert gate.most_at_once == 1
    assert store.stats().entries == len(folders(tmp_path)) == len(gate.lengths) >= 8
    later = StoredAtOnce(tmp_path, block_tokens=BLOCK)
    for name in folders(tmp_path):
        SpinCache.from_pretrained(tmp_path / "entries" / name, models[0]).check_integrity()
    assert later.stats().entries == store.stats().entries


def test_other_caches_request_no_memory_of_what_is_written(
    gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request changes the cache that gives memory, in the thread of the one that needs it."""
    copied = GpuMemory.__deepcopy__

    def shares(self: GpuMemory, memo: dict[int, Any]) -> GpuMemory:
        other_caches.live.add(self)
        return copied(self, memo)

    monkeypatch.setattr(other_caches, "live", weakref.WeakSet())
    monkeypatch.setattr(GpuMemory, "__deepcopy__", shares)
    store = PromptStore(tmp_path, block_tokens=BLOCK)
    for number in range(2):
        read(store, random_tokens(1, 60, seed=number))
        if not number:
            gate.wait_for_a_write()
    memories = [forward_of(prompt.cache).gpu for prompt in store._writer.pending()]
    assert [each in other_caches.live for each in memories] == [False, True]


def test_common_length() -> None:
    for length in (0, 1, 1023, 1024, 1025, 5000):
        for differs in {0, 1, 700, 1023, 1024, 1025, 2048, length - 1, length} & set(range(length + 1)):
            ids = array("q", range(length))
            other = ids[:differs] + array("q", [-1] * (length - differs + 7))
            expected = next((n for n, (one, two) in enumerate(zip(ids, other, strict=False)) if one != two), length)
            for start in {0, min(3, expected), expected}:
                assert common_length(ids, other, start) == common_length(other, ids, start) == expected
