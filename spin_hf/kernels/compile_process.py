"""Compiles kernels in processes of their own, beside a thread that needs Python's lock.

    thread that compiles                <- ready    process
                            Job  -> pipe ->         compiles the kernel, and the library that launches it, to triton's cache
                                         <- done
    the same thread         finds both in triton's cache on the disk

The compiler holds Python's lock for a fifth of its time, while it parses. So eight threads hold it nearly always, and a thread
that launches a prompt beside them waits. Processes do not have this lock in common. They take three seconds to start, as they
import torch, triton and the kernels, and nothing else of the package.

A process ends as soon as there are fewer jobs than processes, and with the process that started it. What it does not compile,
for whatever reason, is left to the thread that asked.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pickle
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import triton
from triton import knobs
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction

from .triton_keys import complete_key

_PACKAGE = Path(__file__).parents[1]
_KERNELS = f"{_PACKAGE.name}.kernels."
_NAMES = {"target", "options", "env_vars"}
"""What triton's function that compiles knows beside the kernel and its source."""
_FEWEST_CORES = 8
"""With fewer cores, processes would take as long to start as threads take to compile."""
_MOST = 8
_START = f"""
import sys, types
sys.path[:] = sys.argv[1:]
package = types.ModuleType({_PACKAGE.name!r})
package.__path__ = [{str(_PACKAGE)!r}]  # without its `__init__`, which imports transformers
sys.modules[package.__name__] = package
from {_PACKAGE.name}.kernels.compile_process import serve
serve()
"""


@dataclass(frozen=True)
class Job:
    """A variant of a kernel, and where it goes: what triton's `compile` takes, and its environment."""

    module: str
    kernel: str
    signature: dict[str, Any]
    constants: dict[Any, Any]
    attrs: dict[Any, Any]
    target: Any
    options: dict[str, Any]
    env: dict[str, Any]
    cache_dir: str

    def compile(self) -> None:
        """Compile it to triton's cache."""
        from triton.backends.nvidia.driver import CudaLauncher

        knobs.cache.dir = self.cache_dir
        kernel = getattr(importlib.import_module(self.module), self.kernel)
        complete_key(kernel)
        source = ASTSource(kernel, self.signature, self.constants, self.attrs)
        made = triton.compile(source, target=self.target, options=self.options, _env_vars=self.env)
        with suppress(Exception):  # the thread that asked builds it then
            CudaLauncher(made.src, made.metadata)


def job_of(key: Any, compile_fn: Callable[[], Any]) -> Job | None:
    """The job of a compile that triton asks for; None if it is done already, or if only this process can do it.

    Args:
        key: triton's cache key.
        compile_fn: the function by which `JITFunction` compiles.
    """
    known = inspect.getclosurevars(compile_fn).nonlocals
    kernel, source = known.get("self"), known.get("src")
    if not isinstance(kernel, JITFunction) or not isinstance(source, ASTSource) or not known.keys() >= _NAMES:
        return None
    target = known["target"]
    if knobs.compilation.always_compile or target.backend != "cuda" or not kernel.module.startswith(_KERNELS):
        return None
    cache = get_cache_manager(sha256(key.encode("utf-8")).hexdigest())
    if cache.get_file(f"{source.name[:150]}.json") is not None:
        return None
    return Job(
        kernel.module, kernel.fn.__name__, source.signature, source.constants, source.attrs, target,
        dict(known["options"].__dict__), known["env_vars"], knobs.cache.dir,
    )  # fmt: skip


def most_processes() -> int:
    """How many processes may compile beside this one; 0 if threads do better."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    can_start = bool(sys.executable) and not getattr(sys, "frozen", False)
    return min(_MOST, cores // 2) if can_start and cores >= _FEWEST_CORES else 0


class CompilerProcesses:
    """Processes that compile, each for one thread at a time. They are started when they are needed."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._idle: list[Compiler] = []
        self._busy = 0
        """Processes that do a job."""
        self._jobs = 0
        """Jobs that were announced and have not ended."""

    def expect(self) -> None:
        """Announce a job, so that processes are kept for it until `ended`."""
        with self._lock:
            self._jobs += 1

    def ended(self) -> None:
        """A job has ended, by whomever it was done. Processes that no other job needs are ended."""
        with self._lock:
            self._jobs -= 1
            kept = max(0, self._jobs - self._busy)
            surplus, self._idle = self._idle[kept:], self._idle[:kept]
        for process in surplus:
            process.end()

    def compile(self, job: Job, waits: bool = True) -> bool:
        """Have a process do a job that was announced.

        Args:
            waits: whether to wait for a process that starts. Else it is left to start for a later job.
        Returns:
            whether the job is done.
        """
        with self._lock:
            self._idle.sort(key=Compiler.is_ready)  # the last one is taken
            process = self._idle.pop() if self._idle else None
            self._busy += 1
        done, is_alive = False, True
        try:
            process = process or Compiler()
            if waits or process.is_ready():
                done = process.ask(job)
        except Exception:  # it has ended, cannot start, or cannot be sent this job: the thread that asked does it
            is_alive = False
        with self._lock:
            self._busy -= 1
            if process is not None and is_alive:
                self._idle.append(process)
        if process is not None and not is_alive:
            process.end()
        return done


class Compiler:
    """A process that compiles. It is ready some seconds after this was made."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, *sys.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )  # fmt: skip
        self._is_new = True
        """Whether it has not been asked yet, so that it will say first that it is ready."""

    def is_ready(self) -> bool:
        """Whether `ask` would be answered at once, but for the job itself."""
        if not self._is_new:
            return True
        answers = self._process.stdout
        assert answers is not None
        waiting = select.poll()  # unlike `select`, for any number of open files
        waiting.register(answers, select.POLLIN)
        return bool(waiting.poll(0))

    def ask(self, job: Job) -> bool:
        """Do a job. Returns whether it is done.

        Raises:
            EOFError, OSError: the process has ended.
        """
        jobs, answers = self._process.stdin, self._process.stdout
        assert jobs is not None
        assert answers is not None
        if self._is_new:
            self._is_new = not pickle.load(answers)
        jobs.write(pickle.dumps(job))
        jobs.flush()
        done: bool = pickle.load(answers)
        return done

    def end(self) -> None:
        """End the process, which does no job."""
        self._process.kill()
        with suppress(OSError), self._process:  # closes the pipes and waits
            pass


def serve() -> None:
    """Do the jobs that come by the standard input, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one is meant
    jobs, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed is no answer
    _serve(jobs, answers)


def _serve(jobs: BinaryIO, answers: BinaryIO) -> None:
    done = True  # ready
    while True:
        pickle.dump(done, answers)
        answers.flush()
        try:
            job: Job = pickle.load(jobs)
        except EOFError:
            return
        try:
            job.compile()
            done = True
        except Exception:
            done = False
