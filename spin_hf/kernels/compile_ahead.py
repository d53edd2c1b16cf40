"""Kernels compiled several at a time, before the first of them is launched.

Triton compiles a kernel when it is first launched, so one after the other: half a minute on a machine that has none of them
yet, before the first answer. Whoever launches several in a row does it twice, the first time without launching:

    launches(launch)             launch(one_kernel, grid, ...); launch(other_kernel, grid, ...)

    compile_ahead(launches)      what is missing is compiled on threads; nothing runs on the device
    launches(launch_now)         now they run
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
    """Compile what `launches` launches; what is compiled already costs microseconds. Mutates nothing on the device.

    What does not compile is left to the launch, which says why.
    """
    # The mode is a context variable, which triton leaves set when it is interrupted: so in a context of its own.
    copy_context().run(_compile, launches)


def _compile(launches: Callable[[Launch], object]) -> None:
    with _Threads(os.cpu_count() or 1) as threads, triton.AsyncCompileMode(threads, ignore_errors=True):
        launches(_compile_one)
        if threads.compiles:
            report(threads.compiles)


class _Threads(ThreadPoolExecutor):
    """Threads that remember what they compile."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.compiles: list[Future[Any]] = []

    def submit(self, *args: Any, **options: Any) -> Future[Any]:
        compile_ = super().submit(*args, **options)
        self.compiles.append(compile_)
        return compile_


def _compile_one(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    if isinstance(kernel, JITFunction):  # else it is interpreted
        kernel.warmup(*args, grid=grid, **options)
