"""The bar while kernels are compiled: shown for long compiles where somebody sees it, else silent. The compiles are fake."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from transformers.utils import logging

import spin_hf
from spin_hf.integration import compile_bar

pytest.importorskip("triton")


class Stream(io.StringIO):
    """A file that says when the bar has appeared on it."""

    def __init__(self) -> None:
        super().__init__()
        self.shown = threading.Event()

    def write(self, text: str) -> int:
        if "Compiling" in text:
            self.shown.set()
        return super().write(text)


class Terminal(Stream):
    def isatty(self) -> bool:
        return True


class Notebook(Stream):
    """As ipykernel's stream, which is no terminal."""


Notebook.__module__ = "ipykernel.iostream"


def compile_fake(stderr: Stream, *kernels: Callable[[], object]) -> int:
    """Have `compile_ahead` wait for fake compiles. Returns how many succeeded."""
    from triton.runtime._async_compile import active_mode

    from spin_hf.kernels.compile_ahead import compile_ahead

    finished: list[Any] = []

    def launches(launch: Any) -> None:
        mode = active_mode.get()
        assert mode is not None
        for number, kernel in enumerate(kernels):
            mode.submit(number, kernel, finished.append)

    with contextlib.redirect_stderr(stderr):
        compile_ahead(launches)
    return len(finished)


def quick() -> None:
    """A kernel that is in Triton's cache."""


def slow() -> None:
    """A kernel that takes longer than the bar's delay."""
    time.sleep(0.2)


@pytest.fixture(autouse=True)
def switched_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compile_bar, "DELAY_S", 0.05)
    was = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    yield
    (logging.enable_progress_bar if was else logging.disable_progress_bar)()


@pytest.fixture(params=[Terminal, Notebook])
def stderr(request: pytest.FixtureRequest) -> Stream:
    stream: Stream = request.param()
    return stream


def until_shown(stream: Stream) -> Callable[[], None]:
    """A kernel that is compiled when the bar has appeared."""

    def compile_() -> None:
        assert stream.shown.wait(10)

    return compile_


def test_a_long_compile_shows_a_bar(stderr: Stream) -> None:
    assert compile_fake(stderr, quick, until_shown(stderr), until_shown(stderr)) == 3
    printed = stderr.getvalue()
    assert "Compiling GPU kernels" in printed
    assert "3/3" in printed


def test_kernels_in_the_cache_show_nothing(stderr: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_bar, "DELAY_S", 60.0)
    assert compile_fake(stderr, quick, quick) == 2
    assert compile_fake(stderr) == 0
    assert stderr.getvalue() == ""


def test_the_switch_of_transformers_silences_it(stderr: Stream) -> None:
    logging.disable_progress_bar()
    assert compile_fake(stderr, slow) == 1
    assert stderr.getvalue() == ""


def test_a_file_gets_no_bar() -> None:
    file = Stream()
    assert compile_fake(file, slow) == 1
    assert file.getvalue() == ""


def test_a_compile_that_fails_is_left_to_the_launch(stderr: Stream) -> None:
    def fail() -> None:
        until_shown(stderr)()
        raise RuntimeError("does not compile")

    assert compile_fake(stderr, fail, quick) == 1
    assert "2/2" in stderr.getvalue()


def test_a_generation_in_another_thread_shows_it_too(stderr: Stream) -> None:
    thread = threading.Thread(target=compile_fake, args=(stderr, until_shown(stderr)))
    thread.start()
    thread.join()
    assert "1/1" in stderr.getvalue()


def test_importing_the_package_sets_the_report() -> None:
    from spin_hf.kernels import compile_progress

    assert spin_hf.SpinCache
    assert compile_progress._report is compile_bar.show_compiles


def test_a_background_thread_compiles_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launches are collected at once. What fails to compile is left to the launch."""
    from spin_hf.kernels import compile_ahead

    begun, seen = threading.Event(), list[tuple[Any, ...]]()

    def compile_one(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        assert begun.wait(10)
        if kernel == "broken":
            raise RuntimeError("does not compile")
        seen.append((threading.current_thread().name, kernel, grid, args, options))

    monkeypatch.setattr(compile_ahead, "_compile_one", compile_one)
    device, collected = torch.device("cpu"), list[str]()

    def launches(name: str, launch: Any) -> None:
        collected.append(name)
        launch(name, (1, 2), 3, num_warps=4)

    compiles = [compile_ahead.compile_behind(partial(launches, name), device) for name in ("one", "broken", "two")]
    assert collected == ["one", "broken", "two"]
    assert not seen
    begun.set()
    for each in compiles:
        compile_ahead.wait_for_compiles(each)
    assert [(kernel, *others) for _, kernel, *others in seen] == [
        ("one", (1, 2), (3,), {"num_warps": 4}), ("two", (1, 2), (3,), {"num_warps": 4})
    ]  # fmt: skip
    assert {name for name, *_ in seen} != {threading.current_thread().name}


def test_what_is_launched_meanwhile_is_compiled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches by `launch_now` are not made, and what they would compile ahead is left to the background threads."""
    from spin_hf.kernels import compile_ahead

    seen = list[Any]()
    monkeypatch.setattr(compile_ahead, "_compile_one", lambda kernel, grid, *args: seen.append((kernel, grid, *args)))

    def launches(launch: Any) -> None:
        assert not compile_ahead.compile_ahead(lambda launch: launch("ahead", (1,)))
        compile_ahead.launch_now("one", (1,), 2)  # a kernel would have to be subscripted by its grid
        launch("two", (3,), 4)

    compile_ahead.wait_for_compiles(compile_ahead.compile_behind(launches, torch.device("cpu")))
    assert seen == [("one", (1,), 2), ("two", (3,), 4)]
    with pytest.raises(TypeError):
        compile_ahead.launch_now("one", (1,), 2)


def test_kernels_are_compiled_at_the_same_time_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches in the background do not wait for each other. A kernel that is being compiled is waited for."""
    from triton.runtime._async_compile import active_mode

    from spin_hf.kernels import compile_ahead

    together, compiled, finished = threading.Barrier(3), list[str](), list[str]()
    asked, all_asked = list[str](), threading.Event()
    monkeypatch.setattr(compile_ahead.os, "cpu_count", lambda: 3)
    compile_ahead._compilers.cache_clear()

    def compile_(name: str) -> str:
        if name != "broken":
            together.wait(10)  # for the others, of two batches and of this thread
            compiled.append(name)
            return name
        raise RuntimeError("does not compile")

    def compile_one(kernel: Any, grid: tuple[int, ...]) -> None:
        mode = active_mode.get()
        assert mode is not None
        mode.submit(kernel, partial(compile_, kernel), finished.append)
        asked.append(kernel)
        if len(asked) == 4:
            all_asked.set()

    monkeypatch.setattr(compile_ahead, "_compile_one", compile_one)
    names = [("one", "broken"), ("two", "one")]
    behind = [
        compile_ahead.compile_behind(
            lambda launch, batch=batch: [launch(name, (1,)) for name in batch], torch.device("cpu")
        )
        for batch in names
    ]
    assert all_asked.wait(10)
    assert compile_ahead.compile_ahead(
        lambda launch: [compile_ahead._compile_one(name, (1,)) for name in ("two", "three")]
    )
    for each in behind:
        each.wait()
    compile_ahead._compilers.cache_clear()
    assert sorted(compiled) == ["one", "three", "two"]
    assert sorted(finished) == ["one", "one", "three", "two", "two"], "each batch gets its kernels"
