"""What the first answer waits for: times of tokens, and what which thread compiles, on a CPU with a small model."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.speed import new_machine
from spin_hf.kernels import compile_ahead
from spin_hf.kernels.compile_process import CompilerProcesses
from tests.support.tiny_llama import tiny_llama


@pytest.fixture(autouse=True)
def unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a `Watch` replaces is put back afterwards."""
    from triton import knobs
    from triton.runtime import build

    monkeypatch.setattr(knobs.compilation, "listener", None)
    monkeypatch.setattr(build, "_build", lambda name: name)
    monkeypatch.setattr(compile_ahead.Compiles, "wait", compile_ahead.Compiles.wait)
    monkeypatch.setattr(CompilerProcesses, "compile", lambda processes, job, waits: job == "done")


def test_times_of_an_answer() -> None:
    (made,) = new_machine.answers(tiny_llama(), 40, 2, 3, 1)
    assert 0 < made["first_token_s"] < made["all_s"]
    assert made["slowest_later"] in (2, 3)
    assert made["slowest_later_s"] <= made["all_s"] - made["first_token_s"] + 1e-3
    assert made["compiled_by_main_thread"] == []


def test_the_slowest_later_token() -> None:
    times = new_machine.Times()
    times.at = [0.0, 0.1, 2.0, 2.5, 4.0, 4.25]
    assert times.summary() == {
        "first_token_s": 2.0, "slowest_later_s": 1.5, "slowest_later": 3, "median_later_ms": 500.0, "all_s": 4.25,
    }  # fmt: skip


def test_what_the_main_thread_compiles_is_named() -> None:
    from triton import knobs
    from triton.runtime import build

    watch, times = (
        new_machine.Watch(),
        SimpleNamespace(ir_initialization=5e5, lowering_stages=[("ttir", 1e6)], store_results=0),
    )
    listen: Any = knobs.compilation.listener
    listen(src=SimpleNamespace(name="loaded"), times=times, cache_hit=True)
    listen(src=SimpleNamespace(name="compiled"), times=times, cache_hit=False)
    assert build._build("library") == "library"
    thread = threading.Thread(target=build._build, args=("other",))
    thread.start()
    thread.join()
    done: Future[list[Any]] = Future()
    done.set_result([])
    compile_ahead.wait_for_compiles(compile_ahead.Compiles(done))
    asked: list[Any] = ["done", "failed", "done"]
    assert [CompilerProcesses().compile(job) for job in asked] == [True, False, True]
    found = watch.summary()
    assert [(name, seconds) for name, seconds, _ in found["compiled_by_main_thread"]] == [
        ("compiled", 1.5),
        ("library", 0.0),
    ]
    assert found["compiled_by_other_threads"] == 1
    assert found["compiled_by_processes"] == 2
    assert 0 <= found["waited_s"] < 1
