"""Where a captured decode step's GPU time goes: microseconds of every kernel, bytes moved, and the rates that makes.

Steps run under `generate` and torch.profiler. Once that has run, launching a CUDA graph takes a millisecond longer on the host
for the rest of the process, so `decode.py` comes here after all times per token.

    per layer    a kernel's time over steps and layers; kernels of the package by name, one launched once a step for all layers
                 counts its share; all others as a sum (matrix products, norms, RoPE, sampling)
    summaries    read by scoring: the first that the method keeps, of all pages of the context
    attended     pages that attention reads, wherever they are;  loaded: those of them that come over the link
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pkgutil import walk_packages
from typing import Any

from torch.profiler import ProfilerActivity, profile

import spin_hf.kernels
from benchmarks.common.timing import FEW, generate
from benchmarks.speed.overlap import set_spread
from benchmarks.speed.spin_rows import WARM, Traffic, filled_cache, is_paged, page_bytes
from spin_hf import SpinCache
from spin_hf.attention.methods.base import Method

STEPS = 12


def kernel_names() -> list[str]:
    """Names of all Triton kernels of the package, those too that methods launch."""
    modules = (import_module(found.name) for found in walk_packages(spin_hf.kernels.__path__, "spin_hf.kernels."))
    found = {
        getattr(getattr(value, "fn", None), "__name__", "") for module in modules for value in vars(module).values()
    }
    return sorted(name for name in found if name.endswith("_kernel"))


def per_layer(
    events: Iterable[tuple[str, int, float]], names: list[str], steps: int, layers: int
) -> tuple[dict[str, float], dict[str, float], float]:
    """Sort a profile by kernel.

    Args:
        events: name, launches and microseconds in all, of each GPU kernel.
        names: of the package's kernels.
    Returns:
        microseconds a layer, and launches a step, by the names that occurred; microseconds a layer of all others.
    """
    took: dict[str, float] = {}
    launches: dict[str, float] = {}
    others = 0.0
    for event, count, total in events:
        matching = [name for name in names if event.startswith(name)]
        if matching:
            name = max(matching, key=len)
            took[name] = took.get(name, 0.0) + total / steps / layers
            launches[name] = launches.get(name, 0.0) + count / steps
        else:
            others += total / steps / layers
    return took, launches, others


def bytes_per_layer(cache: SpinCache, counts: dict[str, int], steps: int) -> dict[str, int]:
    """Bytes that a layer moves in a step.

    Args:
        counts: of `steps` steps, over all layers and KV heads.
    """
    state = cache._state
    layers, store = len(cache.paged_layers), cache.paged_layers[0].store
    assert store is not None
    scored: Any = next(iter(store.summaries.values()))
    row_bytes = sum(array.row_bytes for array in scored.arrays)
    pages = state.sequences.length // store.page_size
    return {
        "summaries": pages * row_bytes * store.num_heads,
        "attended": round(counts["TOKENS"] / steps / layers * store.backing.row_bytes / store.page_size),
        "loaded": round(counts["LOADS"] / steps / layers * page_bytes(cache)),
    }


def rates(took: dict[str, float], moved: dict[str, int]) -> dict[str, float]:
    """GB/s of the kernels whose bytes are known, by the beginning of their names, and of all together."""
    result = {}
    for kernel, kind in (("score", "summaries"), ("attend", "attended")):
        time = sum(us for name, us in took.items() if name.startswith(kernel))
        if time:
            result[kernel] = round(moved[kind] / time / 1e3, 1)
    result["all"] = round((moved["summaries"] + moved["attended"]) / max(1e-9, sum(took.values())) / 1e3, 1)
    return result


def kernel_row(
    model: Any, num_tokens: int, budget: int, gpu_memory: str, method: Method, spread: float
) -> dict[str, Any]:
    """Times, bytes and rates of one context and cap, at the replayed overlap."""
    set_spread(model, spread)
    cache, _ = filled_cache(model, num_tokens, budget, gpu_memory, method)
    for count in [FEW] + [WARM // 2] * (2 if is_paged(cache) else 0):
        generate(model, cache, cache.get_seq_length(), count)
    traffic, held = Traffic(cache), cache.get_seq_length()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        generate(model, cache, held, STEPS)
    events = [(event.key, event.count, event.self_device_time_total) for event in profiled.key_averages()]
    layers = len(cache.paged_layers)
    took, launches, others = per_layer([e for e in events if e[2]], kernel_names(), STEPS, layers)
    moved = bytes_per_layer(cache, traffic.since(), STEPS)
    return {
        "cache": "spin", "gpu_memory": gpu_memory, "overlap": "replayed", "spread": spread,
        "us_per_layer": {name: round(us, 2) for name, us in sorted(took.items())},
        "launches_per_step": {name: round(count, 2) for name, count in sorted(launches.items())},
        "spin_us_per_layer": round(sum(took.values()), 2), "others_us_per_layer": round(others, 2),
        "step_ms": round((sum(took.values()) + others) * layers / 1e3, 3),
        "bytes_per_layer": moved, "gb_s": rates(took, moved), **traffic.row(STEPS),
    }  # fmt: skip
