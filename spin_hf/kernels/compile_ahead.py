"""Compiles several kernels in parallel, before the first one is launched.

Triton compiles a kernel at its first launch, so one after the other. With an empty cache that takes half a minute before the
first token. Code that launches several kernels therefore runs its launches twice:

    launches(launch)             launch(one_kernel, grid, ...); launch(other_kernel, grid, ...)

    compile_ahead(launches)      compiles missing kernels on threads; nothing runs on the device
    launches(launch_now)         launches them

Or it lets background threads do so, and waits for that later:

    compiles = compile_behind(launches, device)     collects the launches, and returns
    wait_for_compiles(compiles)

A launch that the background compiles at that moment waits for it. What calls a kernel from Python is a small C library, which a
C compiler builds: the thread that compiled the kernel builds it too. A kernel that several threads ask for is compiled once.

The compiler holds Python's lock while it parses a kernel. A background thread has another process compile for it where that is
faster (`compile_process.py`), so that the thread that launches the prompt has the lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from contextvars import ContextVar, copy_context
from functools import lru_cache
from threading import Lock
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime._async_compile import FutureKernel, active_mode
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from .compile_process import CompilerProcesses, job_of, most_processes
from .compile_progress import report
from .device_guard import on_device_of_arguments
from .launch import Launch
from .triton_keys import complete_key

_Made = tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]
"""A launch: kernel, grid, arguments, options."""

_collector: ContextVar[Launch | None] = ContextVar("spin_hf_collector", default=None)
_MOST_BEHIND = 8
"""Threads that compile in the background. More would take Python's lock from the thread that launches the prompt too often."""
_processes = CompilerProcesses()
_lock = Lock()
_running: dict[Any, Future[Any]] = {}
"""Triton's cache key of a kernel -> its compile, until it is done."""


def launch_now(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel on the device of its tensors. Within the `launches` of `compile_behind`, it is only compiled."""
    collect = _collector.get()
    if collect is not None:
        collect(kernel, grid, *args, **options)
        return
    complete_key(kernel)
    if _running and active_mode.get() is None:  # maybe this kernel; in an active mode triton waits for it itself
        compile_ahead(lambda launch: launch(kernel, grid, *args, **options))
    with on_device_of_arguments(args):
        kernel[grid](*args, **options)


def compile_ahead(launches: Callable[[Launch], object]) -> bool:
    """Compile the kernels that `launches` launches. A kernel that is compiled already costs microseconds.

    Mutates nothing on the device. A kernel that fails to compile is skipped here; its launch raises the error.

    Returns:
        False within the `launches` of `compile_behind`, which compiles them all. Nothing is done then.
    """
    if _collector.get() is not None:
        return False
    # The mode is a context variable that triton leaves set after an interrupt, so it gets a context of its own.
    copy_context().run(_compile, launches)
    return True


class Compiles:
    """Kernels that background threads compile.

    Args:
        submitted: triton's `FutureKernel` of each kernel that was not compiled, once all of them are asked for.
    """

    def __init__(self, submitted: Future[list[Any]]) -> None:
        self._submitted = submitted

    def wait(self) -> None:
        """Wait for all of them, with a progress bar if that takes long. Those that failed are left to their launch."""
        kernels = self._submitted.result()
        running = [kernel.future for kernel in kernels if not kernel.future.done()]
        if running:
            report(running)
        for kernel in kernels:
            kernel.result(ignore_errors=True)


def compile_behind(
    launches: Callable[[Launch], object], device: torch.device, needed_soon: bool = False
) -> Compiles:  # fmt: skip
    """Start `compile_ahead` on background threads. The arguments of the launches are made now.

    Also compiles what is launched by `launch_now` meanwhile. Those outputs are never written, so `launches` must not read them.
    Launches that were given earlier are compiled first. One that fails to compile is skipped.

    Args:
        needed_soon: whether threads compile them while processes start, which takes seconds and leaves Python's lock to others.
    """
    made: list[_Made] = []

    def collect(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        made.append((kernel, grid, args, options))

    token = _collector.set(collect)
    try:
        launches(collect)
    finally:
        _collector.reset(token)

    def submit() -> list[Any]:
        mode = _Mode(_compilers(), ignore_errors=True)
        mode.by_processes, mode.needed_soon = most_processes() > 0, needed_soon
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            copy_context().run(mode.submit_all, made)
        made.clear()
        return list(mode.future_kernels.values())

    return Compiles(_submitter().submit(submit))


def wait_for_compiles(compiles: Compiles) -> None:
    """Wait for the end of `compile_behind`, with a progress bar if that takes long."""
    compiles.wait()


@lru_cache(maxsize=1)
def _submitter() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "spin_hf-submit")


@lru_cache(maxsize=1)
def _compilers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(most_processes() or min(_MOST_BEHIND, os.cpu_count() or 1), "spin_hf-compile")


def _compile(launches: Callable[[Launch], object]) -> None:
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads, _Mode(threads, ignore_errors=True) as mode:
        launches(_compile_one)
        if mode.raw_futures:
            report(mode.raw_futures)


class _Mode(triton.AsyncCompileMode):
    """Compiles what is launched on the threads of its executor, unless a thread of another mode compiles it already."""

    by_processes = needed_soon = False
    """Whether these threads have processes compile, and do so themselves while these start."""

    def submit(self, key: Any, compile_fn: Callable[[], Any], finalize_fn: Callable[[Any], object]) -> FutureKernel:
        """Called by triton for each kernel that is neither compiled nor in a cache of this process."""
        known = self.future_kernels.get(key)
        if known is not None:
            return known
        with _lock:
            future, is_new = _running.get(key), key not in _running
            if future is None:
                future = _running[key] = self._submitted(key, compile_fn)
                future._key = key
        if is_new:
            future.add_done_callback(lambda _: _running.pop(key, None))
        self.raw_futures.append(future)
        kernel = self.future_kernels[key] = FutureKernel(finalize_fn, future)
        return kernel

    def _submitted(self, key: Any, compile_fn: Callable[[], Any]) -> Any:
        if not self.by_processes:
            return self.executor.submit(_with_launcher, compile_fn)
        _processes.expect()
        return self.executor.submit(_by_process, key, compile_fn, not self.needed_soon)

    def submit_all(self, made: list[_Made]) -> None:
        """Compile launches without waiting for that. Those that fail are skipped."""
        active_mode.set(self)
        for kernel, grid, args, options in made:
            with suppress(Exception):
                _compile_one(kernel, grid, *args, **options)


def _by_process(key: Any, compile_fn: Callable[[], Any], waits: bool) -> Any:
    """As `_with_launcher`, but if a process has compiled first, this finds the kernel in triton's cache.

    Args:
        waits: for a process that starts.
    """
    try:
        job = job_of(key, compile_fn)
        if job is not None:
            _processes.compile(job, waits)
        return _with_launcher(compile_fn)
    finally:
        _processes.ended()


def _with_launcher(compile_fn: Callable[[], Any]) -> Any:
    """Compile a kernel, and the library that launches it. Triton finds both in its cache later, without calling CUDA here."""
    kernel = compile_fn()
    if isinstance(kernel, CompiledKernel):
        driver.active.launcher_cls(kernel.src, kernel.metadata)
    return kernel


def _compile_one(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    if isinstance(kernel, JITFunction):  # an interpreted kernel has nothing to compile
        complete_key(kernel)
        with on_device_of_arguments(args):
            kernel.warmup(*args, grid=grid, **options)
