"""Compiles two kernels of prompts behind, by other processes, for a GPU that this machine need not have.

Runs in a process of its own, without TRITON_INTERPRET: triton reads it when a kernel is defined.

    python -m tests.support.compile_by_processes compile    prints JSON: for each kernel whether this process found it in
                                                            triton's cache, what processes have done, and processes left
    python -m tests.support.compile_by_processes broken     the same with processes that end at once
    python -m tests.support.compile_by_processes soon       the same for kernels that are needed soon
    python -m tests.support.compile_by_processes keys       prints digests of the keys of all kernels, in several orders
"""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
import random
import sys
from types import SimpleNamespace
from typing import Any

import torch

import spin_hf.kernels


def compiled(mode: str) -> dict[str, Any]:
    """Compile two kernels behind."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from spin_hf.kernels import compile_ahead, compile_process
    from spin_hf.kernels.prompt.gather_tokens import gather_tokens
    from spin_hf.kernels.prompt.merge_partials import merge_into
    from spin_hf.kernels.resident_pages import ResidentPages

    found, asked = dict[str, bool](), dict[str, bool]()
    original = compile_process.CompilerProcesses.compile

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        found[src.name] = cache_hit

    def ask(self: Any, job: Any, waits: bool) -> bool:
        asked[job.kernel] = original(self, job, waits)
        return asked[job.kernel]

    def launches(launch: Any) -> None:
        rows = torch.zeros((1, 2, 4), dtype=torch.int64)
        gather_tokens(ResidentPages(rows[0, 0, :1], rows, 64, 64, 8, 64, 64, torch.bfloat16), 1)
        partial = torch.zeros((1, 2, 4, 16, 64), dtype=torch.bfloat16), torch.zeros((1, 2, 4, 16))
        merge_into([partial] * 2, None, torch.zeros((1, 16, 8, 64), dtype=torch.bfloat16))

    target = GPUTarget("cuda", 90, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target,
            launcher_cls=lambda src, metadata: None,
        )
    )  # fmt: skip
    knobs.compilation.listener = listen
    compile_process.CompilerProcesses.compile = ask  # type: ignore[method-assign]
    compile_ahead.most_processes = lambda: 2
    if mode == "broken":
        compile_process._START = "raise SystemExit"
    compile_ahead.compile_behind(launches, torch.device("cpu"), needed_soon=mode == "soon").wait()
    left = compile_ahead._processes
    return {"found": found, "asked": asked, "jobs": left._jobs, "idle": len(left._idle)}


def digests_of_keys() -> list[str]:
    """Of the keys of all functions that triton compiles, computed in several orders."""
    from triton.runtime.jit import JITFunction

    from spin_hf.kernels.triton_keys import complete_key

    names = sorted(found.name for found in pkgutil.walk_packages(spin_hf.kernels.__path__, "spin_hf.kernels."))
    values = [(module, value) for module in map(importlib.import_module, names) for value in vars(module).values()]
    functions = [
        value for module, value in values if isinstance(value, JITFunction) and value.module == module.__name__
    ]
    digests = []
    for seed in range(3):
        for function in functions:  # as they were before any of them had a key
            function.hash, function.used_global_vals = None, {}
        for function in random.Random(seed).sample(functions, len(functions)):
            complete_key(function)
        digests.append(hashlib.sha256("".join(function.cache_key for function in functions).encode()).hexdigest())
    return digests


if __name__ == "__main__":
    mode = sys.argv[1]
    print(json.dumps(digests_of_keys() if mode == "keys" else compiled(mode)))
