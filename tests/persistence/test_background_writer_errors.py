"""Failures while prompts are written to the disk in a thread: full disks, removed folders, interrupts, threads that fail."""

from __future__ import annotations

import copy
import gc
import os
import shutil
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from spin_hf import CapacityError, PromptStore, SpinCache
from spin_hf.persistence import background_writer, files
from spin_hf.persistence.background_writer import BackgroundWriter
from spin_hf.persistence.contents import Contents
from spin_hf.persistence.fingerprint import ModelFacts
from spin_hf.persistence.opened import OpenCache
from tests.support.stores import BLOCK, Gate, folders, read, restored
from tests.support.zoo import build_model, random_tokens


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("CUDA error"), MemoryError("none"), SystemExit("no")]
)
def test_an_error_is_a_warning(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It reaches no caller, leaves no file, and the next prompt is stored."""
    store, save = PromptStore(tmp_path, block_tokens=BLOCK), background_writer.save

    def failing(folder: Path, *args: Any) -> None:
        save(folder, *args)
        monkeypatch.setattr(background_writer, "save", save)
        raise error

    monkeypatch.setattr(background_writer, "save", failing)
    read(store, random_tokens(1, 60))
    assert store.wait(60)
    assert f"a prompt could not be stored in {tmp_path}: {error}" in caplog.text
    assert not folders(tmp_path)
    read(store, random_tokens(1, 60))
    assert store.wait(60)
    assert store.stats().entries == 1


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    store, write = PromptStore(tmp_path, block_tokens=BLOCK), os.write

    def full(descriptor: int, content: Any) -> int:
        if threading.current_thread().name.startswith("spin_hf_save"):
            raise OSError(28, "No space left on device")
        return write(descriptor, content)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        read(store, random_tokens(1, 60))
        assert store.wait(60)
    assert "No space left on device; make room" in caplog.text
    assert not folders(tmp_path)


def test_memory_is_freed_behind_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At once, not when the garbage collector comes: neither the error's frames nor the log hold the pages."""
    sources, init = [], Contents.__init__

    def noted(self: Contents, *args: Any) -> None:
        init(self, *args)
        sources.append(weakref.ref(self))

    def failing(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Contents, "__init__", noted)
    monkeypatch.setattr(files, "create", failing)
    store, ids = PromptStore(tmp_path, block_tokens=BLOCK), random_tokens(1, 60)
    gc.disable()
    try:
        read(store, ids)
        assert store.wait(60)
        assert "No space left on device" in caplog.text
        assert [source() for source in sources] == [None]
    finally:
        gc.enable()


@pytest.mark.parametrize("again", ["removed", "new"])
def test_the_folder_of_the_store_is_removed(
    again: str, gate: Gate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Before a prompt is written, or meanwhile. Nothing is left in a folder that no index knows."""
    folder, store = tmp_path / "store", PromptStore(tmp_path / "store", block_tokens=BLOCK)
    for number in range(2):
        read(store, random_tokens(1, 60 + number, seed=number))
    gate.wait_for_a_write()
    shutil.rmtree(folder)
    if again == "new":
        PromptStore(folder, block_tokens=BLOCK)
    gate.open()
    assert store.wait(60)
    assert caplog.text.count(f"a prompt could not be stored in {folder}") == 2
    assert folder.exists() == (again == "new"), "nobody makes it again"
    assert not list(folder.glob("entries/*"))
    assert PromptStore(folder, block_tokens=BLOCK).stats().entries == 0


def test_the_model_ends_while_its_prompt_waits(gate: Gate, tmp_path: Path) -> None:
    """The entry has the fingerprint of the weights that have read the prompt."""
    model, store = copy.deepcopy(build_model("llama")), PromptStore(tmp_path, block_tokens=BLOCK)
    read(store, random_tokens(1, 70, seed=3), model)
    gate.wait_for_a_write()
    read(store, random_tokens(1, 60), model)
    expected = ModelFacts.of(model)
    assert expected is not None
    assert expected.weights is not None
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)  # type: ignore[operator]
    del model
    gate.open()
    assert store.wait(60)
    found = [OpenCache(folder).manifest.fingerprint["weights"] for folder in (tmp_path / "entries").iterdir()]
    assert found == [expected.weights] * 2
    assert restored(tmp_path, random_tokens(1, 60)) == 59


def test_an_interrupt_while_a_prompt_is_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C may come right behind the start of the thread. Nothing waits for a thread that is not there."""
    store, start = PromptStore(tmp_path, block_tokens=BLOCK), BackgroundWriter._start

    def interrupted(self: BackgroundWriter) -> bool:
        monkeypatch.setattr(BackgroundWriter, "_start", start)
        raise KeyboardInterrupt

    monkeypatch.setattr(BackgroundWriter, "_start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read(store, random_tokens(1, 60))
    assert store.wait(10)
    read(store, random_tokens(1, 60))
    assert store.wait(60)
    assert store.stats().entries == 1


def test_a_cache_that_cannot_be_forked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Any) -> Any:
        raise CapacityError("no room for summaries")

    monkeypatch.setattr(SpinCache, "fork", full)
    store = PromptStore(tmp_path, block_tokens=BLOCK)
    read(store, random_tokens(1, 60))
    assert f"a prompt could not be stored in {tmp_path}: no room for summaries" in caplog.text
    assert store.wait(0)


def test_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A prompt is not stored without a thread, and one thread writes all files if no more can be started."""
    store, start = PromptStore(tmp_path, block_tokens=BLOCK), threading.Thread.start
    most = [0]

    def failing(self: threading.Thread) -> None:
        most[0] -= 1
        if most[0] < 0:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", failing)
    read(store, random_tokens(1, 60))
    assert "can't start new thread" in caplog.text
    assert store.wait(0)
    most[0] = 1
    read(store, random_tokens(1, 60))
    assert store.wait(60)
    assert most[0] == -1
    monkeypatch.undo()
    assert restored(tmp_path, random_tokens(1, 60)) == 59
