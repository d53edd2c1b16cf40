"""Compiles Triton kernels for a GPU that this machine need not have, by the launches of caches on a CPU.

Runs in a process of its own, without TRITON_INTERPRET: triton reads it when a kernel is defined.

    python -m tests.support.compile_for_gpu 90 bfloat16 FILE          the first variant of each kernel
    python -m tests.support.compile_for_gpu 90 bfloat16 FILE every    every variant
    python -m tests.support.compile_for_gpu 90 bfloat16 FILE rows     those of rows that have descriptors of their own

Everything happens as with a GPU, except that `JITFunction.run` specialises and compiles, and does not launch. Kernels write
nothing, so numbers are meaningless; numbers that the package checks come from formulas. FILE, JSON:

    functions    names of all of the package that triton compiles
    kernels      of these, those whose names say so
    called       of these, those that others of them call
    compiled     name and bytes of shared memory of every variant, and whether it and its library were compiled ahead
    failed       name of a kernel, and what the compiler says
    launches     with `numbers` behind FILE: what variants depend on, by launch, for each of some huge options
                 with `early`: the same of launches that were not compiled early, for each of some methods
"""

from __future__ import annotations

import contextlib
import importlib
import json
import pkgutil
import re
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import spin_hf.kernels
from spin_hf import Bisection, Fitted, Quest, RetroInfer, ShadowKV
from spin_hf.backends import triton_step
from spin_hf.backends.triton_indexing import index_completed
from spin_hf.config import MOST_TOKENS
from spin_hf.kernels import device_limits, reference_clustering
from tests.support.cache_driver import CacheDriver, RandomKV, Shape
from tests.support.coded_case import CodedCase
from tests.support.inspection import kernels_of, state_of
from tests.support.oracle import Rules
from tests.support.row_kernels import kernels_for, step_of
from tests.support.seer_gates import method_of, rules_for

SHARED_MEMORY = {75: 64 << 10, 89: 99 << 10, 90: 227 << 10}
"""Bytes that a program may use, by compute capability."""
SHAPE = Shape(kv_heads=1, group=4, key_dim=128, value_dim=128)
PAGE_FRAMES = 2_000_000
"""Bytes, fewer than the prompts below take."""
PROMPT = 2607
FEW, SHORT = 128, 32
"""Points of a part that one program bisects, as there is a variant for each power of two; and their length: both smaller than
on a GPU, as the compiler takes minutes for long ones."""

ONE_VARIANT = {75: {"choose_kernel", "rank_kernel"}, 89: {"choose_kernel", "rank_kernel"}, 90: set()}
"""Kernels that take long and multiply no matrices: all of their variants are compiled for one of the GPUs only."""


class Compiler:
    """Replaces the launching of kernels on the only GPU."""

    def __init__(self, capability: int, every: bool) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.runtime._async_compile import active_mode
        from triton.runtime.driver import driver
        from triton.runtime.jit import JITFunction

        self.compiled: dict[str, dict[str, Any]] = {}
        self.every, self.once = every, ONE_VARIANT[capability]
        self.failed: list[dict[str, str]] = []
        self.only: set[str] | None = None
        """Kernels that are compiled; None for all."""
        self.told_apart: Callable[[Any, Any], str] = lambda arg, param: _told_apart(arg)
        self.launched: set[str] = set()
        self.built: set[str] = set()
        """Hashes of variants of which the library that launches them was built ahead."""
        """What selects a variant, of each launch: kernel, dtypes, ints as triton specialises them, constants."""
        self._run: Callable[..., Any] = JITFunction.run

        def build(src: Any, metadata: Any) -> None:
            assert threading.current_thread() is not threading.main_thread()
            self.built.add(metadata.hash)

        self._active_mode = active_mode
        target = GPUTarget("cuda", capability, 32)
        driver.set_active(
            SimpleNamespace(
                get_current_device=lambda: 0,
                get_current_stream=lambda device: 0,
                get_current_target=lambda: target,
                launcher_cls=build,
            )
        )
        JITFunction.run = lambda kernel, *args, **options: self.run(kernel, *args, **options)

    def run(self, kernel: Any, *args: Any, **options: Any) -> None:
        name, known = kernel.__name__, {variant["name"] for variant in self.compiled.values()}
        constants = {key: _told_apart(value) for key, value in options.items() if key not in ("grid", "warmup")}
        given = [self.told_apart(arg, param) for arg, param in zip(args, kernel.params, strict=False)], constants
        self.launched.add(f"{name} {given}")
        left_out = self.only is not None and name not in self.only
        if left_out or (name in known and (name in self.once or not self.every)):
            return
        try:
            ahead = self._active_mode.get() is not None
            made = self._run(kernel, *args, **{**options, "warmup": True})
            made = made.result() if hasattr(made, "result") else made  # compiled on another thread
            variant = {"name": name, "shared": made.metadata.shared, "ahead": ahead, "built": made.hash in self.built}
            self.compiled.setdefault(made.hash, variant)
        except Exception as error:
            self.failed.append({"name": name, "error": f"{type(error).__name__}: {error}"})


def _told_apart(value: Any) -> str:
    """What a compiled variant depends on, for one argument."""
    if isinstance(value, Tensor):
        return str(value.dtype)
    if isinstance(value, int) and not isinstance(value, bool) and value > 1:
        return f"int{value.bit_length() // 32} {value}"
    return repr(value)


def _specialised(value: Any, param: Any) -> str:
    """What Triton specialises a kernel on, for one argument that is no constant."""
    if isinstance(value, tuple):
        return str([_specialised(each, param) for each in value])
    if isinstance(value, int) and not isinstance(value, bool):
        special = "" if param.do_not_specialize else f"{value == 1} {value % 16 == 0}"
        return f"{special} {value.bit_length() // 32}"
    return _told_apart(value)


def pretend(capability: int, every: bool) -> Compiler:
    """Let caches on a CPU launch as on such a GPU, and let launches compile."""
    compiler = Compiler(capability, every)
    from spin_hf.kernels.indexing import bisect, fill_clusters
    from spin_hf.kernels.triton_launchers import launchers

    init = triton_step.StepKernels.__init__

    def compiled(self: triton_step.StepKernels, *args: Any) -> None:
        init(self, *args)
        self.compiled = True

    def bisected(points: Tensor, page_size: int) -> Tensor:
        bisect.bisect(points[:, : 2 * FEW, :SHORT], page_size)
        return reference_clustering.bisect(points, page_size)

    def clustered(
        points: Tensor, rounds: Any, cluster_tokens: int, page_size: int, steps: int
    ) -> tuple[Tensor, Tensor]:
        fill_clusters.fill_clusters(points, rounds, cluster_tokens, page_size, steps)
        return reference_clustering.fill_clusters(points, cluster_tokens, page_size)

    triton_step.StepKernels.__init__ = compiled  # type: ignore[method-assign]
    bisect._CHUNK = FEW
    launchers.bisect, launchers.fill_clusters = bisected, clustered  # a method that loses tokens is refused
    spin_hf.kernels.launchers = lambda device: launchers  # type: ignore[assignment]
    device_limits.multiplies = lambda device: capability >= 80
    device_limits.overlaps_launches = lambda device: capability >= 90
    device_limits.shared_memory = lambda device: SHARED_MEMORY[capability] - 4096
    torch.cuda.device_of = lambda tensor: contextlib.nullcontext()  # type: ignore[assignment, misc]
    return compiler


# ------------------------------------------------------------------------------------------------------ what is launched


def generate(
    dtype: torch.dtype, method: Any, padded: bool = False, turn: int = 0, **options: Any
) -> None:  # fmt: skip
    """A prompt, a second one of `turn` tokens, a step, and the summary of a page that a captured step completes."""
    length = PROMPT + turn
    kv = RandomKV.random(SHAPE, 1, length + 1, 0).to(dtype)
    driver = CacheDriver(SHAPE, **{"recent_window": 16, "budget": 256, "method": method, **options})
    for start, stop in [(0, PROMPT), *[(PROMPT, length)][:turn], (length, length + 1)]:
        driver.step(kv, start, stop, torch.arange(stop)[None] >= 11 if padded else None)
    (step,) = kernels_of(driver.cache)  # kernels serve the method
    index_completed(step, [layer.state for layer in driver.cache.paged_layers])


def launch_with_huge_numbers(compiler: Compiler) -> list[list[str]]:
    """Launches of one generation, for each of several numbers beyond any context. Compiles the kernels that read them."""
    compiler.only, launches = {"plan_step_kernel", "rerank_kernel", "rate_rerank_kernel"}, []
    generate(torch.bfloat16, Bisection())  # some kernels are compiled ahead once per process
    for number in (MOST_TOKENS, 1 << 31, 1 << 63, 10**30):
        for options in (dict(budget=number), dict(budget=number, recent_window=number, dense_below=number)):
            torch.manual_seed(0)
            compiler.launched = set()
            generate(torch.bfloat16, Bisection(rerank_factor=number), **options)
            launches.append(sorted(compiler.launched))
    return launches


def launch_early(compiler: Compiler) -> list[list[str]]:
    """Launches of a step behind a prompt that were not compiled while it was read, for several methods. Compiles none."""
    from spin_hf.backends import early_compile
    from spin_hf.kernels.compile_ahead import launch_now
    from spin_hf.kernels.triton_launchers import launchers

    early_compile._is_compiled_early = lambda step: True
    launchers.compile_behind = lambda launches, device, soon=False: launches(launch_now)  # type: ignore[assignment, misc]
    launchers.wait_for_compiles = lambda compiles: None  # type: ignore[assignment]
    compiler.only, compiler.told_apart, missing = set(), _specialised, []
    for method, options in ((Fitted(), {}), (Bisection(), {}), (ShadowKV(), {"dense_below": 2 * PROMPT})):
        kv = RandomKV.random(SHAPE, 1, PROMPT + 1, 0).to(torch.bfloat16)
        driver = CacheDriver(SHAPE, recent_window=16, budget=256, method=method, **options)
        driver.step(kv, 0, PROMPT)
        early, compiler.launched = compiler.launched, set()
        driver.step(kv, PROMPT, PROMPT + 1)
        (step,) = kernels_of(driver.cache)
        if not options:
            index_completed(step, [layer.state for layer in driver.cache.paged_layers])
        assert compiler.launched
        missing.append(sorted(compiler.launched - early))
        compiler.launched = set()
    missing.append(launch_chunks(compiler))
    return missing


def launch_chunks(compiler: Compiler) -> list[str]:
    """Launches of the second chunk of a prompt that the first one neither made nor compiled early."""
    first = PROMPT // 2
    kv = RandomKV.random(SHAPE, 1, PROMPT, 0).to(torch.bfloat16)
    driver = CacheDriver(SHAPE, recent_window=16, budget=256, method=Fitted())
    state_of(driver.cache).sequences.expected_tokens = PROMPT
    driver.step(kv, 0, first)
    early, compiler.launched = compiler.launched, set()
    driver.step(kv, first, PROMPT)
    assert any(name.startswith("gather_tokens_kernel") for name in compiler.launched)
    assert any(name.startswith("merge_partials_kernel") for name in compiler.launched)
    return sorted(compiler.launched - early)


def copy_rows(dtype: torch.dtype) -> None:
    """Rows of one array and of several, in both directions; pages, and codes of an odd number of bytes."""
    from spin_hf.kernels.indexing.copy_rows import rows_copiers
    from spin_hf.kernels.launch import RowCopy

    rows, table = torch.arange(4), torch.zeros(1, dtype=torch.int64)
    for many, packed in [(1, torch.empty((1, 4, 2048), dtype=dtype)), (2, torch.empty((2, 4, 3), dtype=torch.int8))]:
        for put in (False, True):
            (copy,) = rows_copiers([[RowCopy([table] * many, 8, rows, packed)]], put)
            copy()


def launch_all(dtype: torch.dtype) -> None:
    """Every method, and every layout of pages, summaries and masks, once each: all combinations would take very long."""
    sinks = torch.zeros(SHAPE.heads, dtype=dtype)
    generate(dtype, ShadowKV())
    generate(dtype, ShadowKV(), prefill="sparse", turn=100)
    generate(dtype, ShadowKV(), prefill="sparse", gpu_memory=PAGE_FRAMES * dtype.itemsize // 4)
    generate(dtype, Bisection(), gpu_memory=PAGE_FRAMES)
    generate(dtype, ShadowKV(), budget=2 * PROMPT)
    generate(dtype, Quest(0), budget=2 * PROMPT, padded=True, softcap=30.0, sink_logits=sinks)
    generate(dtype, Fitted())
    generate(dtype, Fitted(), gpu_memory=PAGE_FRAMES * dtype.itemsize // 5, cpu_dtype="int8")
    generate(dtype, RetroInfer(), gpu_memory=PAGE_FRAMES, cpu_dtype="int8")
    generate(dtype, Quest(0), padded=True, softcap=30.0, sink_logits=sinks)
    with tempfile.TemporaryDirectory() as folder:
        rules = rules_for(SHAPE, Path(folder), Rules(budget=256), gate_dim=128)
        generate(dtype, method_of(rules, Path(folder)), summary_dtype="model")
    copy_rows(dtype)
    coded_step(dtype)


def step_rows(dtype: torch.dtype, method: Any, reads_all: bool = False, **options: Any) -> None:
    """A step of two caches as rows of a batch, one of which completes a page."""
    drivers = []
    for length in (PROMPT, PROMPT - 3):
        driver = CacheDriver(SHAPE, **{"recent_window": 16, "budget": 256, "method": method, **options})
        driver.step(RandomKV.random(SHAPE, 1, length, 0).to(dtype), 0, length)
        drivers.append(driver)
    new = [torch.zeros((1, 4, heads, 1, 128), dtype=dtype) for heads in (SHAPE.heads, SHAPE.kv_heads, SHAPE.kv_heads)]
    step_of(drivers, kernels_for(drivers, 4), *new, reads_all=reads_all)


def launch_rows(dtype: torch.dtype) -> None:
    """Every method, and steps that read everything, with descriptors of each row."""
    step_rows(dtype, Fitted())
    step_rows(dtype, Fitted(), gpu_memory=PAGE_FRAMES * dtype.itemsize // 5, cpu_dtype="int8")
    step_rows(dtype, ShadowKV())
    step_rows(dtype, ShadowKV(), reads_all=True)
    step_rows(dtype, Bisection(), gpu_memory=PAGE_FRAMES)
    step_rows(dtype, RetroInfer())
    step_rows(dtype, Quest(0))


def coded_step(dtype: torch.dtype) -> None:
    """A step over coded pages, with and without padding."""
    from spin_hf.kernels.compile_ahead import compile_ahead, launch_now

    digits, memory = device_limits.multiplies(torch.device("cpu")), device_limits.shared_memory(torch.device("cpu"))
    for group, lengths in [(4, (300,)), (8, (300, 200))]:
        case = CodedCase(group=group, key_dim=128, value_dim=128, dtype=dtype, lengths=lengths, digits=digits)
        case.shape = replace(case.shape, compiled=True, shared_memory=memory)
        compile_ahead(case.launches)
        case.launches(launch_now)


# --------------------------------------------------------------------------------------------- what there is to launch


def functions() -> list[Any]:
    """All functions of the package that triton compiles."""
    from triton.runtime.jit import JITFunction

    names = [found.name for found in pkgutil.walk_packages(spin_hf.kernels.__path__, "spin_hf.kernels.")]
    values = [(module, value) for module in map(importlib.import_module, names) for value in vars(module).values()]
    return [value for module, value in values if isinstance(value, JITFunction) and value.module == module.__name__]


def main(capability: int, dtype: torch.dtype, file: Path, mode: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    compiler, known = pretend(capability, every=mode in ("every", "rows")), functions()
    launches: list[list[str]] = []
    if mode == "numbers":
        launches = launch_with_huge_numbers(compiler)
    elif mode == "rows":
        launch_rows(dtype)
    elif mode == "early":
        launches = launch_early(compiler)
    else:
        launch_all(dtype)
    texts = {function.__name__: function.src for function in known}
    report = {
        "kernels": [name for name in texts if name.endswith("_kernel")],
        "called": [
            name for name in texts if any(re.search(rf"\b{name}\(", texts[other]) for other in texts.keys() - {name})
        ],
        "functions": list(texts),
        "compiled": list(compiler.compiled.values()),
        "failed": compiler.failed,
        "launches": launches,
    }
    file.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(int(sys.argv[1]), getattr(torch, sys.argv[2]), Path(sys.argv[3]), "".join(sys.argv[4:]))
