"""Compiles several kernels in parallel, before the first one is launched.

Triton compiles a kernel at its first launch, so one after the other. With an empty cache that takes half a minute before the
first token. Code that launches several kernels therefore runs its launches twice:

    launches(launch)             launch(one_kernel, grid, ...); launch(other_kernel, grid, ...)

    compile_ahead(launches)      compiles missing kernels on threads; nothing runs on the device
    launches(launch_now)         launches them
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import triton
from triton.runtime.jit import JITFunction

from .compile_progress import report
from .launch import Launch


def launch_now(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel."""
    kernel[grid](*args, **options)


def compile_ahead(launches: Callable[[Launch], object]) -> None:
    """Compile the kernels that `launches` launches. A kernel that is compiled already costs microseconds.

    Mutates nothing on the device. A kernel that fails to compile is skipped here; its launch raises the error.
    """
    # The mode is a context variable that triton leaves set after an interrupt, so it gets a context of its own.
    copy_context().run(_compile, launches)


def _compile(launches: Callable[[Launch], object]) -> None:
    with _Threads(os.cpu_count() or 1) as threads, triton.AsyncCompileMode(threads, ignore_errors=True):
        launches(_compile_one)
        if threads.compiles:
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
        kernel.warmup(*args, grid=grid, **options)
