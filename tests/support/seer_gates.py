"""SeerAttention gates with random weights: a file for the cache, and the same numbers for the oracle.

random_gates   writes the file and returns `SeerRules`
rules_for      `Rules` with random gates for a tiny shape
method_of      the method that reads the gates of such rules
gates_for      the method with random gates for a model
compare_above  single steps of pages above a threshold, against the oracle
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from spin_hf import SeerAttention
from spin_hf.attention.methods.seer_gates import Gates, LayerGate, describe
from tests.support.cache_driver import CacheDriver, Shape
from tests.support.conversation import compare_with_oracle, random_pages, single_steps, without_near_ties
from tests.support.oracle import Rules, SeerRules

RULES = Rules(budget=64, num_sink_tokens=4, recent_window=10)


def random_gates(
    config: Any, layers: int, heads: int, group: int, dim: int, folder: Path, *, page_size: int = 32, gate_dim: int = 6,
    turned: int | None = None, interleaved: bool = False, seed: int = 0,
) -> SeerRules:  # fmt: skip
    """Write random gates to `folder` and return them for the oracle."""
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn((layers, heads, 3 * dim, gate_dim), generator=generator) / (3 * dim) ** 0.5
    query = torch.randn((layers, heads, group, dim, gate_dim), generator=generator) / (group * dim) ** 0.5
    pairs = dim // 2 if turned is None else turned
    angles, own = 10000.0 ** (-torch.arange(pairs) / max(1, pairs)), 0.3 ** torch.arange(gate_dim // 2)
    made = {i: LayerGate(key[i], query[i], angles, own, interleaved) for i in range(layers)}
    Gates(made, page_size, describe(config)).save(folder / "gates.safetensors")
    return SeerRules(
        key.double().numpy(), query.double().numpy(), angles.tolist(), own.tolist(), interleaved, page_size
    )


def rules_for(shape: Shape, folder: Path, rules: Rules = RULES, **options: Any) -> Rules:
    sizes = (shape.layers, shape.kv_heads, shape.group, shape.key_dim)
    return replace(rules, seer=random_gates(shape.config(), *sizes, folder, **options))


def method_of(rules: Rules, folder: Path) -> SeerAttention:
    assert rules.seer is not None
    return SeerAttention(folder, page_size=rules.seer.page_size, threshold=rules.seer.threshold)


def gates_for(model: Any, folder: Path, **options: Any) -> SeerAttention:
    config = model.config
    group = config.num_attention_heads // config.num_key_value_heads
    sizes = (config.num_hidden_layers, config.num_key_value_heads, group, 16)
    random_gates(config, *sizes, folder, **options)
    return SeerAttention(folder)


def compare_above(threshold: float, stop: int, folder: Path) -> CacheDriver:
    """Compare steps 400 to `stop` with the oracle, where fewer pages than the budget reach `threshold`."""
    budget, drivers = 128, list[CacheDriver]()
    rules = rules_for(Shape(), folder, replace(RULES, budget=budget))
    assert rules.seer is not None
    rules = replace(rules, seer=replace(rules.seer, threshold=threshold))

    def run(seed: int) -> None:
        kv = random_pages(Shape(), 1, stop, seed)
        drivers.append(compare_with_oracle(kv, rules, single_steps(400, stop), method=method_of(rules, folder)))

    without_near_ties(run)
    assert drivers[-1].cache.stats().attended_tokens < budget + 2 * 32  # two pages hold sinks and recent window
    return drivers[-1]
