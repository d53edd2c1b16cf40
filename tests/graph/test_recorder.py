"""The order in which a recorder forks, joins and synchronises streams of several GPUs, with fakes that note what is called."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from spin_hf.graph import recorder
from spin_hf.graph.recorder import Recorder

DEVICES = [torch.device("cuda", index) for index in range(3)]


class _Stream:
    def __init__(self, notes: list[str], name: str) -> None:
        self.notes, self.name = notes, name

    def wait_stream(self, other: _Stream) -> None:
        self.notes.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is called, in order. Contexts are noted at their begin and end."""
    found: list[str] = []

    def noting(begin: Callable[..., str]) -> Callable[..., Any]:
        @contextmanager
        def context(*args: Any, **options: Any) -> Iterator[None]:
            text = begin(*args, **options)
            found.append(text)
            yield
            found.append(f"end: {text}")

        return context

    class Graph:
        def replay(self) -> None:
            found.append("replay")

    streams = {device: _Stream(found, f"current{device.index}") for device in DEVICES}
    fakes = {
        "CUDAGraph": Graph,
        "MemPool": lambda: "pool",
        "Stream": lambda device: _Stream(found, f"capture{device.index}"),
        "current_stream": streams.__getitem__,
        "synchronize": lambda device: found.append(f"synchronize {device.index}"),
        "device": noting(lambda device: f"on {device.index}"),
        "stream": noting(lambda stream: f"stream {stream.name}"),
        "graph": noting(lambda graph, stream, capture_error_mode: f"capture on {stream.name}"),
        "use_mem_pool": noting(lambda pool, device: f"{pool} of {device.index}"),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(recorder, "_streams", {})
    return found


def test_one_gpu_needs_no_other_stream(notes: list[str]) -> None:
    one = Recorder(DEVICES[1:2])
    assert one.record(lambda: notes.append("step") or 7) == 7
    assert notes == [
        "stream capture1", "capture on capture1", "step", "end: capture on capture1", "end: stream capture1"
    ]  # fmt: skip
    notes.clear()
    one.replay()
    assert notes == ["replay"]


def test_other_gpus_are_forked_and_joined(notes: list[str]) -> None:
    made = Recorder(DEVICES)
    assert notes == ["on 1", "end: on 1", "on 2", "end: on 2"]  # each pool belongs to its device
    notes.clear()
    made.record(lambda: notes.append("step"))
    begun = notes[: notes.index("step")]
    assert begun == [
        "synchronize 1", "stream capture1", "synchronize 2", "stream capture2", "stream capture0", "capture on capture0",
        "pool of 1", "pool of 2", "capture1 waits for capture0", "capture2 waits for capture0",
    ]  # fmt: skip
    ended = notes[notes.index("step") + 1 :]
    assert ended[:2] == ["capture0 waits for capture1", "capture0 waits for capture2"]
    assert ended.index("end: pool of 1") < ended.index("end: capture on capture0")


def test_a_replay_is_ordered_with_the_streams_of_all_gpus(notes: list[str]) -> None:
    made = Recorder(DEVICES)
    notes.clear()
    made.replay()
    assert notes == [
        "current0 waits for current1", "current0 waits for current2", "replay",
        "current1 waits for current0", "current2 waits for current0",
    ]  # fmt: skip


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.usefixtures("notes")
def test_the_garbage_collector_does_not_run_during_a_capture(fails: bool) -> None:
    """It may destroy another graph, which breaks the capture."""
    enabled = []

    def step() -> None:
        enabled.append(gc.isenabled())
        if fails:
            raise ValueError("reads the device")

    with pytest.raises(ValueError, match="reads") if fails else nullcontext():
        Recorder(DEVICES[:1]).record(step)
    assert enabled == [False]
    assert gc.isenabled()


def test_a_step_that_fails_is_joined_and_its_error_is_raised(notes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = Recorder(DEVICES[:2])

    def step() -> None:
        notes.append("step")
        raise ValueError("reads the device")

    with pytest.raises(ValueError, match="reads the device"):
        made.record(step)
    assert notes[notes.index("step") + 1] == "capture0 waits for capture1"

    def breaks() -> None:
        monkeypatch.setattr(_Stream, "wait_stream", _broken)
        raise ValueError("breaks the capture")

    with pytest.raises(ValueError, match="breaks the capture"):
        Recorder(DEVICES[:2]).record(breaks)


def _broken(*_: Any) -> None:
    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
