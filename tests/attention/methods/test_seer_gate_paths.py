"""Files of gates at wrong paths, behind errors of the system, and changed while their gates are in use."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spin_hf import OptionError, SeerAttention, SpinCache
from spin_hf.attention.methods import seer_gate_file
from spin_hf.attention.methods.seer_gate_file import load_gates
from spin_hf.attention.methods.seer_gates import Gates, LayerGate, describe
from tests.support.gate_files import SHAPE, good_gates, refused, with_tensors


@pytest.fixture(autouse=True)
def _no_gates_in_memory() -> None:
    seer_gate_file._cached.clear()


def test_paths(tmp_path: Path) -> None:
    (tmp_path / "folder" / "gates.safetensors").mkdir(parents=True)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    good_gates(tmp_path)
    wrong = ["", "x" * 5000, "a\0b", "~nobody-of-this-name/x", "/dev/zero", "/dev/null"]
    wrong += [str(tmp_path / name) for name in ("none", "folder", "loop", "pipe", "gates.safetensors/x", "y" * 300)]
    for path in wrong:
        with pytest.raises(
            OptionError, match=r"expected a file of gates or a folder with gates\.safetensors, got"
        ) as raised:
            SpinCache(SHAPE.config(), SeerAttention(path))
        assert len(str(raised.value)) < 800

    class Bytes:
        def __fspath__(self) -> bytes:
            return os.fsencode(tmp_path)

    assert load_gates(Bytes()).page_size == 32  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("number", "message"), [(5, "Input/output error"), (13, "Permission denied"), (24, "Too many open files")]
)
def test_errors_of_the_system(number: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = good_gates(tmp_path)

    def fail(*args: Any, **options: Any) -> Any:
        raise OSError(number, message)

    monkeypatch.setattr(Path, "open", fail)
    refused(file, f"expected a file that can be read, got {message}")


def settled(file: Path, seconds: int = 100) -> None:
    """Make the file look old. The time of its inode cannot be set, so tests move the clock forward instead."""
    then = time.time_ns() - seconds * 10**9
    os.utime(file, ns=(then, then))


def first_weight(file: Path) -> float:
    return float(load_gates(file).layers[0].key.flatten()[0])


def replaced(file: Path, number: float) -> None:
    other = file.with_name("other.safetensors")
    other.write_bytes(file.read_bytes())
    with_tensors(other, lambda tensors: tensors["layers.0.key"].view(-1)[:1].fill_(number))
    other.replace(file)


def rewritten(file: Path, number: float) -> None:
    other = file.with_name("other.safetensors")
    other.write_bytes(file.read_bytes())
    with_tensors(other, lambda tensors: tensors["layers.0.key"].view(-1)[:1].fill_(number))
    with file.open("r+b") as opened:
        opened.write(other.read_bytes())


@pytest.mark.parametrize("change", [replaced, rewritten])
@pytest.mark.parametrize("old", [False, True])
def test_another_file_of_the_same_size_and_time(
    change: Callable[[Path, float], None], old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is replaced or rewritten, with the same times; just made, or old and cached."""
    file, now = good_gates(tmp_path), time.time_ns
    settled(file)
    before = file.stat()
    if old:
        monkeypatch.setattr(seer_gate_file.time, "time_ns", lambda: now() + 10**11)
    first = first_weight(file)
    assert bool(seer_gate_file._cached) == old
    for number in (0.25, 0.5, 0.75):
        change(file, number)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        if old:
            time.sleep(0.02)  # the inode's time comes in steps; a file this young is not kept
        assert first_weight(file) == number != first


def test_gates_are_kept_while_the_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, now = good_gates(tmp_path), time.time_ns
    assert load_gates(file) is not load_gates(file), "it was written a moment ago"
    monkeypatch.setattr(seer_gate_file.time, "time_ns", lambda: now() + 10**11)
    assert load_gates(file) is load_gates(tmp_path)
    for number in range(6):
        (tmp_path / str(number)).mkdir()
        load_gates(good_gates(tmp_path / str(number), seed=number))
    assert len(seer_gate_file._cached) == 4


def test_gates_stay_what_they_were(tmp_path: Path) -> None:
    """While the file is cut or written over: a mapping would show it, or end the process."""
    file = good_gates(tmp_path)
    gates = load_gates(file)
    before = {number: gate.key.clone() for number, gate in gates.layers.items()}
    with file.open("r+b") as opened:
        opened.write(b"\0" * file.stat().st_size)
        opened.truncate(0)
    assert all(gate.key.equal(before[number]) for number, gate in gates.layers.items())


def test_what_cannot_be_read_is_not_written(tmp_path: Path) -> None:
    file = good_gates(tmp_path)
    before, gates = file.read_bytes(), load_gates(file)
    wrong: list[LayerGate] = [
        replace(gates.layers[0], key=torch.full_like(gates.layers[0].key, number)) for number in (float("nan"), 1e9)
    ]
    wrong += [
        replace(gates.layers[0], query=torch.zeros((2, 2, 7, 6))),
        replace(gates.layers[0], key=gates.layers[0].key.long()),
    ]
    for gate in wrong:
        with pytest.raises(OptionError, match=r"gates: expected layer 1.*, got .*; train"):
            Gates({0: gates.layers[0], 1: gate}, 32, describe(SHAPE.config())).save(file)
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gates.safetensors"]
