"""Every cache that a user could take instead of `SpinCache(model)`, measured in the same process.

floor          a step in a CUDA graph captured by hand, attention left out
dense graph    the same with flash decoding over all tokens: what a serving engine does
dynamic        DynamicCache under `generate`              offloaded   DynamicCache(offloading=True)
static         StaticCache, compiled by `generate`; `first_call_s` is mostly the compilation
default        SpinCache(model) as it is: dense attention where that is faster (`dense_below="auto"`)
spin eager     SpinCache(model), with a hook on one of the model's modules, so that steps are not captured
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

from benchmarks.common.shapes import fill, fill_spin, states
from benchmarks.common.timing import free, tpot
from benchmarks.speed.dense_graph import DenseLayer, in_graph
from spin_hf import SpinCache

FAST = ("floor", "dense graph", "dynamic")
OWN = ("default",)
SLOW = ("static", "offloaded", "spin eager")
ONLY_AT = {"offloaded": (4096, 8192, 32768, 131072), "spin eager": (8192, 131072)}
"""Contexts of rows that take long or tell nothing new elsewhere; 512K offloaded needs 4 s a token."""


def measure_rival(model: Any, name: str, num_tokens: int, budget: int, batch: int = 1) -> dict[str, Any]:
    """The row of one rival at one context. Raises torch.cuda.OutOfMemoryError where it does not fit.

    Args:
        batch: sequences, of FAST rivals; others have one.
    """
    free()
    config = model.config
    if name in ("floor", "dense graph"):
        held = num_tokens if name == "dense graph" else 16
        layers = [DenseLayer(*states(config, held, batch=batch)) for _ in range(config.num_hidden_layers)]
        return in_graph(model, Cache(layers=layers), num_tokens, name == "dense graph", batch)
    if name == "dynamic":
        cache = fill(DynamicCache(config=config), config, num_tokens, batch)
        return tpot(model, cache, num_tokens, many=24, times=2, batch=batch)
    if name == "offloaded":
        cache = fill(DynamicCache(config=config, offloading=True), config, num_tokens)
        slow = num_tokens > 65536
        return tpot(model, cache, num_tokens, few=2, many=6 if slow else 12, times=1 if slow else 2)
    if name == "static":
        torch._dynamo.reset()
        try:
            cache = fill(StaticCache(config=config, max_cache_len=num_tokens + 300), config, num_tokens)
            return tpot(model, cache, num_tokens, many=24 if num_tokens > 65536 else 72, times=2)
        finally:
            torch._dynamo.reset()
    if name == "default":
        spin = SpinCache(model, budget=budget)
        fill_spin(spin, config, num_tokens)
        return tpot(model, spin, num_tokens)
    spin = SpinCache(model, "shadowkv", budget=budget, dense_below=0)
    fill_spin(spin, config, num_tokens)
    hook = next(model.children()).register_forward_hook(lambda *_: None)
    try:
        return tpot(model, spin, num_tokens, many=24, times=2)
    finally:
        hook.remove()
