"""Compiles several kernels in parallel, before the first one is launched.

Triton compiles a kernel at its first launch, so one after the other. With an empty cache that takes half a minute before the
first token. Code that launches several kernels therefore runs its launches twice:

    launches(launch)             launch(one_kernel, grid, ...); launch(other_kernel, grid, ...)

    compile_ahead(launches)      compiles missing kernels on threads; nothing runs on the device
    launches(launch_now)         launches them

Or it lets a background thread do so, and waits for that later:

    compiles = compile_behind(launches, device)     collects the launches, and returns
    wait_for_compiles(compiles)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from contextvars import copy_context
from functools import lru_cache
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

from .compile_progress import report
from .device_guard import on_device_of_arguments
from .launch import Launch


def launch_now(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel on the device of its tensors."""
    with on_device_of_arguments(args):
        kernel[grid](*args, **options)


def compile_ahead(launches: Callable[[Launch], object]) -> None:
    """Compile the kernels that `launches` launches. A kernel that is compiled already costs microseconds.

    Mutates nothing on the device. A kernel that fails to compile is skipped here; its launch raises the error.
    """
    # The mode is a context variable that triton leaves set after an interrupt, so it gets a context of its own.
    copy_context().run(_compile, launches)


def compile_behind(launches: Callable[[Launch], object], device: torch.device) -> Future[None]:
    """Start `compile_ahead` on a background thread. The arguments of the launches are made now, and held until it ends.

    Launches that were given earlier are compiled first. One that fails to compile is skipped.
    """
    made: list[tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []
    launches(lambda kernel, grid, *args, **options: made.append((kernel, grid, args, options)))

    def again(launch: Launch) -> None:
        for kernel, grid, args, options in made:
            launch(kernel, grid, *args, **options)

    def compile_() -> None:
        with suppress(Exception), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            copy_context().run(_compile, again, False)

    return _background().submit(compile_)


def wait_for_compiles(compiles: Future[None]) -> None:
    """Wait for the end of `compile_behind`, with a progress bar if that takes long."""
    if not compiles.done():
        report([compiles])
        compiles.result()


@lru_cache(maxsize=1)
def _background() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "spin_hf-compile")


def _compile(launches: Callable[[Launch], object], reports: bool = True) -> None:
    with _Threads(os.cpu_count() or 1) as threads, triton.AsyncCompileMode(threads, ignore_errors=True):
        launches(_compile_one)
        if threads.compiles and reports:
            report(threads.compiles)


class _Threads(ThreadPoolExecutor):
    """Thread pool that records its futures."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.compiles: list[Future[Any]] = []

    def submit(self, *args: Any, **options: Any) -> Future[Any]:
        compile_ = super().submit(*args, **options)
        self.compiles.append(compile_)
        return compile_


def _compile_one(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    if isinstance(kernel, JITFunction):  # an interpreted kernel has nothing to compile
        with on_device_of_arguments(args):
            kernel.warmup(*args, grid=grid, **options)
