"""Methods that cluster tokens, compared step by step with an oracle of their own. The clusters are read back from the cache.

Head            one KV head of one sequence, dense, with the tokens of every page and the pages of every cluster
Zones           of a query: the pages that are always attended to, and the candidates
compare_step    one step through the cache and through `expect(rules, method, head, queries, at, sinks) -> [G, Dv]`
compare_with_clustered_oracle    several steps
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tests.support.cache_driver import CacheDriver, RandomKV
from tests.support.conversation import Step, is_dense
from tests.support.inspection import state_of
from tests.support.oracle import Rules

TOLERANCE = 1e-5
Expect = Callable[[Rules, Any, "Head", np.ndarray, int, Any], np.ndarray]


@dataclass
class Head:
    """One KV head of one sequence: keys [L, D], values [L, Dv], is_real [L], tokens of each page, pages of each cluster."""

    keys: np.ndarray
    values: np.ndarray
    is_real: np.ndarray
    pages: list[list[int]]
    clusters: list[list[int]]
    page_size: int


def head_of(driver: CacheDriver, kv: RandomKV, layer: int, b: int, h: int, valid: torch.Tensor) -> Head:
    store = driver.cache.layers[layer].store
    num_pages = store.sequences.num_pages
    tokens = store.permutation.positions(0, num_pages)[b, h].tolist()
    sizes = store.permutation.pages_per_cluster(0, num_pages)[b, h].tolist()
    clusters = [list(range(page, page + size)) for page, size in enumerate(sizes) if size]
    assert sorted(page for cluster in clusters for page in cluster) == list(range(num_pages))
    keys, values = (x[layer][b, h].double().numpy() for x in (kv.keys, kv.values))
    return Head(keys, values, valid[b].numpy(), tokens, clusters, store.page_size)


@dataclass
class Zones:
    """Tokens of each page up to the query; pages always attended to; clusters of candidates; pages within the budget."""

    held: list[list[int]]
    always: set[int]
    clusters: list[list[int]]
    room: int


def zones_of(rules: Rules, head: Head, at: int) -> Zones:
    size, seen = head.page_size, [token for token in range(at + 1) if head.is_real[token]]
    held = [[token for token in page if token <= at and head.is_real[token]] for page in head.pages[: at // size + 1]]
    always = {token // size for token in seen[: rules.num_sink_tokens]}
    always |= {token // size for token in seen[max(0, len(seen) - rules.recent_window) :]}
    firsts = {page for page in range(len(held)) if held[page] and page not in always}
    clusters = [cluster for cluster in head.clusters if cluster[0] in firsts]
    assert not any(page in always for cluster in clusters for page in cluster)
    budget = rules.budget_tokens(len(seen))
    return Zones(held, always, clusters, len(held) if len(seen) <= budget else math.ceil(budget / size))


def softmax_over(
    rules: Rules,
    head: Head,
    q: np.ndarray,
    exact: list[int],
    estimated: list[tuple[int, np.ndarray, np.ndarray]],
    sink: Any,
    logit_correction: list[float] | None = None,
) -> np.ndarray:
    """Attention of one query [D] to tokens, and to estimates of others as (tokens, mean key, mean value): [Dv].

    Args:
        logit_correction: nats added to the logit of each estimate.
    """
    more = np.array(logit_correction or [0.0] * len(estimated))
    keys = np.array([key for _, key, _ in estimated]).reshape(-1, len(q))
    values = np.array([value for _, _, value in estimated]).reshape(-1, head.values.shape[1])
    logits = rules.scale * np.concatenate([head.keys[exact] @ q, keys @ q])
    logits[len(exact) :] += more
    if rules.softcap is not None:
        logits = rules.softcap * np.tanh(logits / rules.softcap)
    weights = np.exp(logits)
    weights[len(exact) :] *= [count for count, _, _ in estimated]
    total = weights.sum() + (0.0 if sink is None else math.exp(sink))
    return weights / total @ np.concatenate([head.values[exact], values])


def compare_step(
    expect: Expect,
    driver: CacheDriver,
    kv: RandomKV,
    rules: Rules,
    start: int,
    stop: int,
    given: Any,
    sinks: Any = None,
) -> int:
    """One step through both; returns the number of sparse queries."""
    sparse = 0
    outputs = driver.step(kv, start, stop, given)
    valid = torch.ones((kv.keys[0].shape[0], stop), dtype=torch.bool) if given is None else given
    for layer, out in enumerate(outputs):
        for b, h in np.ndindex(out.shape[0], kv.shape.kv_heads):
            head = head_of(driver, kv, layer, b, h, valid)
            heads = slice(h * kv.shape.group, (h + 1) * kv.shape.group)
            for at in range(start, stop):
                if not valid[b, at]:
                    continue
                dense = is_dense(rules, start, stop)
                sparse += not dense
                queries = kv.queries[layer][b, heads, at].double().numpy()
                logits = None if sinks is None else sinks[heads].tolist()
                if dense:
                    seen = [token for token in range(at + 1) if head.is_real[token]]
                    each = zip(queries, [None] * len(queries) if logits is None else logits, strict=True)
                    expected = np.array([softmax_over(rules, head, q, seen, [], sink) for q, sink in each])
                else:
                    expected = expect(rules, state_of(driver.cache).method, head, queries, at, logits)
                worst = float(np.abs(out[b, at - start, heads].double().numpy() - expected).max())
                assert worst <= TOLERANCE, f"token {at} of sequence {b}, layer {layer}, KV head {h}: off by {worst:.1e}"
    driver.cache.check_integrity()
    return sparse


def compare_with_clustered_oracle(
    expect: Expect, method: Any, kv: RandomKV, rules: Rules, steps: list[Step], sinks: Any = None, **options: Any
) -> CacheDriver:
    """Several steps through both, some of them sparse; returns the driver in its last state."""
    rules = replace(rules, scale=kv.shape.key_dim**-0.5)
    driver = CacheDriver(
        kv.shape, softcap=rules.softcap, sink_logits=sinks, method=method, budget=rules.budget,
        num_sink_tokens=rules.num_sink_tokens, recent_window=rules.recent_window, **options,
    )  # fmt: skip
    start = sparse = 0
    for stop, given in steps:
        sparse += compare_step(expect, driver, kv, rules, start, stop, given, sinks)
        start = stop
    assert sparse > 0
    return driver
