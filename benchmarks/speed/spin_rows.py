"""Rows of `SpinCache(model)`: captured steps under `generate`, at the lowest, the replayed and the highest overlap."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.inspection import counted_by_kernels
from benchmarks.common.shapes import fill_spin
from benchmarks.common.timing import TIMES, attempt, free, tpot, with_memory
from benchmarks.speed.overlap import FASTEST, NEARLY_STILL, find_spread, measure, real_overlap, set_spread
from spin_hf import SpinCache
from spin_hf.attention.methods.base import Method

SELECTIONS: dict[str, tuple[float | None, float]] = {
    "replayed": (None, FASTEST), "lowest": (1.0, FASTEST), "highest": (0.0, NEARLY_STILL),
}  # fmt: skip
"""Spread and fastest turn of each; None is found by `find_spread`."""
PROFILED = 16
"""Distance in steps at which the overlap is measured too."""
WARM = 144
"""Tokens generated before what is timed where pages are loaded, so that the buffer holds what it will go on holding."""


def filled_cache(model: Any, num_tokens: int, budget: int, gpu_memory: str, method: Method) -> tuple[SpinCache, float]:
    """A cache of so many tokens, and the seconds that filling it took."""
    free()
    cache = SpinCache(model, budget=budget, gpu_memory=gpu_memory, method=method, dense_below=0)
    torch.cuda.synchronize()
    started = time.perf_counter()
    fill_spin(cache, model.config, num_tokens)
    torch.cuda.synchronize()
    return cache, time.perf_counter() - started


def is_paged(cache: SpinCache) -> bool:
    """Whether pages come from host memory."""
    return any(layer.store is not None and layer.store.frames is not None for layer in cache.paged_layers)


def page_bytes(cache: SpinCache) -> int:
    """Bytes of one page of one KV head."""
    store = cache.paged_layers[0].store
    assert store is not None
    return store.backing.row_bytes


class Traffic:
    """What the kernels of a cache count from `start` on."""

    def __init__(self, cache: SpinCache) -> None:
        self.cache = cache
        self.start()

    def start(self) -> None:
        """Count from here on."""
        self.before = counted_by_kernels(self.cache)

    def since(self) -> dict[str, int]:
        """Counts since then, over layers, KV heads and steps, by the names of `Counter`."""
        return {name: count - self.before[name] for name, count in counted_by_kernels(self.cache).items()}

    def row(self, tokens: int) -> dict[str, float]:
        """Hit rate, MiB loaded per token, and tokens attended to per KV head, of the last `tokens` tokens of all sequences."""
        counts = self.since()
        needed = counts["HITS"] + counts["LOADS"]
        return {
            "loads_mib_per_token": round(counts["LOADS"] * page_bytes(self.cache) / tokens / 2**20, 3),
            "hit_rate": round(counts["HITS"] / needed, 4) if needed else 1.0,
            "attended_tokens": round(counts["TOKENS"] / max(1, counts["QUERIES"]), 1),
        }


def spin_rows(
    model: Any,
    num_tokens: int,
    budget: int,
    gpu_memory: str,
    method: Method,
    selections: list[str],
    spread: float | None,
    weights: int,
) -> Iterator[dict[str, Any]]:
    """Rows of one context, cap and method.

    Args:
        spread: which replays a real model's overlap, if that is known; else it is looked for.
        weights: bytes of the model.
    """
    cache, filled = filled_cache(model, num_tokens, budget, gpu_memory, method)
    started = time.perf_counter()
    measure(model, cache, steps=2)
    torch.cuda.synchronize()
    first_steps = time.perf_counter() - started
    for name in selections:
        wanted, fastest = SELECTIONS[name]
        if wanted is None and spread is None:
            spread = replaying_spread(model, cache)
        used = spread if wanted is None else wanted
        assert used is not None
        row: dict[str, Any] = {"cache": "spin", "overlap": name, "gpu_memory": gpu_memory, "spread": used}
        set_spread(model, used, fastest)
        distances = (1, PROFILED) if name == "replayed" else (1,)
        found = measure(model, cache, steps=4 + max(distances), distances=distances)
        row |= {f"overlap_at_{distance}": round(share, 4) for distance, share in found.items()}
        times = TIMES if name == "replayed" else 2
        yield row | attempt(lambda times=times: with_memory(lambda: timed(model, cache, times), weights)) | {
            "fill_s": round(filled, 2), "first_two_eager_steps_s": round(first_steps, 2),
            "captured": sum(step is not None for step in cache.calls.steps.captured.values()) if cache.calls.steps else 0,
        }  # fmt: skip


def replaying_spread(model: Any, cache: SpinCache, first: float = 0.2, tolerance: float = 0.012) -> float:
    """The spread that gives a real model's overlap from step to step; looked for from `first` on."""

    def overlap_at(spread: float) -> float:
        set_spread(model, spread)
        return measure(model, cache)[1]

    return find_spread(overlap_at, real_overlap(), tolerance, first=first)[0]


def timed(model: Any, cache: SpinCache, times: int = TIMES, padding: Tensor | None = None) -> dict[str, Any]:
    """The time per step of a cache, a token of each sequence, and what it held and loaded meanwhile.

    Args:
        times: the median of so many.
        padding: [B], how many tokens in front of each sequence are padding; None for none.
    """
    traffic, batch = Traffic(cache), cache.stats().sequences
    took = tpot(
        model, cache, cache.get_seq_length(), times=times, warm=WARM if is_paged(cache) else 0,
        before_timed=traffic.start, batch=batch, padding=padding,
    )  # fmt: skip
    stats = cache.stats()
    return {
        **took, **traffic.row(int(took["timed_tokens"]) * batch),
        "gpu_gib": round(stats.gpu_bytes / 2**30, 2), "cpu_gib": round(stats.cpu_bytes / 2**30, 2),
    }  # fmt: skip
