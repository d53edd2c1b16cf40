"""An error bound for decode kernels: as close to float64 as eager attention in the same dtype, whatever unused memory holds.

    expected   softmax in float64 (`tests/support/oracle.py`) over the tokens that its own ShadowKV or Quest picks
    allowed    the error that eager torch attention in the data's dtype makes on these tokens, `_ROUNDINGS`, and two epsilons of
               float32 of the largest sum of products of a score: rounding grows with scores, and one eager run is one sample
    poison     NaN in outputs, scratch, free page frames, unwritten places of pages, and summaries of unfinished pages

`tests/backends/test_triton_float64.py` checks the interpreted kernels, `tests/gpu/test_float64.py` those of a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spin_hf import Quest, ShadowKV
from spin_hf.kernels.descriptor_fields import LOAD_MARK, StepField
from spin_hf.layer import SpinLayer
from tests.support.cache_driver import CacheDriver, RandomKV, Shape
from tests.support.oracle import Rules, attended, attention

_ROUNDINGS = {torch.float32: 8, torch.float16: 1, torch.bfloat16: 1}
"""Epsilons of sum(weight * |value|): half dtypes round a weight and an output once; float32 has a GPU's fast exponential."""
_CAP_ROUNDINGS = 2
"""Epsilons of float32 times softcap, in each score: the kernel caps by softcap * (2 * sigmoid(2 * score / softcap) - 1)."""
MARGINS = {torch.float32: 2e-5, torch.float16: 0.01, torch.bfloat16: 0.05}
"""How far scores and cosines lie apart where pages are chosen: several roundings of a stored landmark."""
DTYPES = list(MARGINS)
ALL = Rules(budget=1 << 20, recent_window=8)
SOME = Rules(budget=32, recent_window=8)
"""Four pages, one of them an outlier."""
BOXES = Rules(budget=32, recent_window=8, quest=True)
"""Two pages."""


# -------------------------------------------------------------------------------------------------------------- a case


@dataclass(frozen=True)
class Case:
    """A prompt, and the decode steps after it, which are checked.

    Attributes:
        sizes: tokens of each step.
        lengths: real tokens of each prompt, padded on the left to the longest.
    """

    shape: Shape
    dtype: torch.dtype = torch.float32
    rules: Rules = ALL
    sizes: tuple[int, ...] = (1, 1)
    lengths: tuple[int, ...] = (43,)
    sink_logits: tuple[float, ...] = ()
    int8_pages: bool = False
    """Whether pages in the cpu tier are int8. Keys and values are then numbers that int8 holds exactly."""

    @property
    def prompt(self) -> int:
        return max(self.lengths)

    def valid(self, stop: int) -> np.ndarray:
        """[B, stop]"""
        return np.arange(stop) >= self.prompt - np.array(self.lengths)[:, None]

    def kv(self, seed: int, device: torch.device) -> RandomKV:
        """Random data; where the budget leaves pages out, data whose pages differ clearly."""
        kv = RandomKV.random(self.shape, len(self.lengths), self.prompt + sum(self.sizes), seed)
        if self.rules.budget == SOME.budget:
            kv = _far_apart(kv, seed, self.rules.page_size)
        kv = kv.exact_in_int8() if self.int8_pages else kv
        return kv.to(device, self.dtype)


def _far_apart(kv: RandomKV, seed: int, page_size: int) -> RandomKV:
    """Pages along one direction, 0.3 apart, in random order; one of them has a key of the opposite direction."""
    generator = torch.Generator().manual_seed(1000 + seed)
    keys, queries, dim = kv.keys[0], kv.queries[0], kv.shape.key_dim
    along = torch.randn((*keys.shape[:2], 1, dim), generator=generator)
    along /= along.norm(dim=-1, keepdim=True)
    num_pages = -(-keys.shape[2] // page_size)
    steps = torch.rand((*keys.shape[:2], num_pages), generator=generator).argsort(-1)
    far = (3 + 0.3 * steps).repeat_interleave(page_size, 2)[:, :, : keys.shape[2]].clone()
    far[:, :, 3 * page_size + 5] *= -1
    strength = torch.linspace(0.7, 1.0, kv.shape.group).repeat(kv.shape.kv_heads)[:, None, None] * dim**0.5
    query = strength * along.repeat_interleave(kv.shape.group, 1) + 0.1 * queries
    return replace(kv, keys=[far.unsqueeze(-1) * along + 0.1 * keys], queries=[query])


def check_against_float64(case: Case, device: torch.device, seed: int = 0, **options: Any) -> CacheDriver:
    """Run the case: every output of its decode steps must be as close to float64 as eager attention."""
    int8 = case.rules.int8 or case.dtype.itemsize == 2
    rules, kv = replace(case.rules, scale=case.shape.key_dim**-0.5, int8=int8), case.kv(seed, device)
    sinks = torch.tensor(case.sink_logits, dtype=case.dtype, device=device) if case.sink_logits else None
    driver = CacheDriver(
        case.shape, softcap=rules.softcap, sink_logits=sinks, budget=rules.budget,
        method=Quest(rules.dense_layers) if rules.quest else ShadowKV(),
        num_sink_tokens=rules.num_sink_tokens, recent_window=rules.recent_window,
        summary_dtype="int8" if int8 else "auto", cpu_dtype="int8" if case.int8_pages else "auto", **options,
    )  # fmt: skip
    _step(driver, kv, case, 0, case.prompt)
    layer, start, tokens = driver.cache.layers[0], case.prompt, []
    assert isinstance(layer, SpinLayer)
    for size in case.sizes:
        _poison(layer)
        out = _step(driver, kv, case, start, start + size)
        assert bool(out.isfinite().all())
        found = _compare(case, rules, kv, sinks, out, start)
        if size > 1 or not layer.cache_state.reads_all:  # a step that attends to whole segments selects nothing
            tokens += found
        start += size
    counted = layer.forward.backends.counted()
    assert counted["QUERIES"] == len(tokens), "the kernels did not serve every query"
    assert counted["TOKENS"] == sum(tokens)
    assert tokens or case.rules.budget == ALL.budget
    assert rules.budget != SOME.budget or max(tokens) < case.prompt // 2
    driver.cache.check_integrity()
    return driver


def _step(driver: CacheDriver, kv: RandomKV, case: Case, start: int, stop: int) -> Tensor:
    """One forward, with a mask where prompts are padded: [B, tokens, heads, Dv]."""
    valid = None if len(case.lengths) == 1 else torch.tensor(case.valid(stop), device=kv.keys[0].device)
    return driver.step(kv, start, stop, valid)[0]


def _compare(case: Case, rules: Rules, kv: RandomKV, sinks: Tensor | None, out: Tensor, start: int) -> list[int]:
    """Check outputs [B, Q, heads, Dv] of one step; returns the number of tokens that each query and KV head attends to."""
    keys, values, queries = (part[0].double().cpu().numpy() for part in (kv.keys, kv.values, kv.queries))
    actual, group, counts = out.double().cpu().numpy(), case.shape.group, []
    eps = torch.finfo(case.dtype).eps
    rounding = _ROUNDINGS[case.dtype] * eps
    rounding += _CAP_ROUNDINGS * torch.finfo(torch.float32).eps * (rules.softcap or 0.0)
    for b, i, h in np.ndindex(out.shape[0], out.shape[1], case.shape.kv_heads):
        heads, position = slice(h * group, (h + 1) * group), start + i
        query = queries[b, heads, position]
        tokens = attended(rules, keys[b, h], case.valid(position + 1)[b], query, position)
        logits = [None] * group if sinks is None else sinks[heads].tolist()
        exact, size = (
            np.stack([attention(rules, keys[b, h], x, tokens, q, s) for q, s in zip(query, logits, strict=True)])
            for x in (values[b, h], abs(values[b, h]))
        )
        rows = [kv.queries[0][b, heads, position], kv.keys[0][b, h, tokens], kv.values[0][b, h, tokens]]
        eager = _eager(*rows, rules, None if sinks is None else sinks[heads]).double().cpu().numpy()
        products = abs(query) @ abs(keys[b, h, tokens]).T * rules.scale  # what the sum of a score may lose
        lost = 2 * torch.finfo(torch.float32).eps * products.max()
        allowed = abs(eager - exact).max() + (rounding + lost) * size
        worst = (abs(actual[b, i, heads] - exact) / allowed).max()
        assert worst <= 1, f"sequence {b}, KV head {h}, position {position}: {worst:.2f} times the error allowed"
        counts.append(len(tokens))
    return counts


def _eager(query: Tensor, keys: Tensor, values: Tensor, rules: Rules, sinks: Tensor | None) -> Tensor:
    """Attention as transformers' eager functions compute it, all in the data's dtype but the softmax: [G, Dv]."""
    scores = query @ keys.T * rules.scale
    if rules.softcap is not None:
        scores = torch.tanh(scores / rules.softcap) * rules.softcap
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None]], 1)
    weights = torch.softmax(scores, 1, dtype=torch.float32).to(query.dtype)
    return weights[:, : keys.shape[0]] @ values


# -------------------------------------------------------------------------------------------------------------- poison

_NO_SCRATCH = (StepField.DIRECTORY, StepField.VALID, StepField.UPTO, StepField.OUTLIER)


def _poison(layer: SpinLayer) -> None:
    """Fill all memory that the next step must not read."""
    store, sequences, step = layer.store, layer.cache_state.sequences, layer.backend
    assert store is not None
    assert step is not None
    if store.device.type == "cuda":
        torch.cuda.synchronize()  # pages in host memory are read by kernels under way
    nan, length = float("nan"), sequences.length
    complete, rows = length // store.page_size, store.rows(0, sequences.num_pages)
    pages = store.backing.take(rows)
    for part in store.backing_layout.split(pages):
        part[:, :, complete:, length % store.page_size :] = nan if part.is_floating_point() else 127
    arrays = [array for summary in store.summaries.values() for array in summary.arrays]
    held = [array.take(rows[:, :, :complete]) for array in arrays]
    if store.device.type == "cuda":
        torch.cuda.synchronize()  # what was taken is read from there before the host overwrites it
    for array in (store.backing, *arrays):
        for chunk in array.chunks:
            chunk.fill_(nan if chunk.is_floating_point() else 127)
    store.backing.put(rows, pages)
    for array, content in zip(arrays, held, strict=True):
        array.put(rows[:, :, :complete], content)
    if store.frames is not None:
        store.frames.frames.fill_(nan)
        contents, first = store.layout.join(store.backing_layout.take(pages)), 0
        for row, slots in enumerate(store.frames.slots):
            table = store.frames.held(row)
            h, slot = (table >= 0).nonzero(as_tuple=True)
            store.frames.frames[first + h * slots + slot] = contents[row, h, table[h, slot].long()]
            first += table.numel()
    for tensor in step.buffers.scratch:
        tensor.fill_(nan if tensor.is_floating_point() else 127)
    step.buffers.histogram.fill_(1)
    junk = {StepField.LOGITS: nan, StepField.SCORES: nan, StepField.LIST_PAGE: LOAD_MARK}
    for field, tensor in step.scratch.items():
        if field not in _NO_SCRATCH:
            tensor.fill_(junk.get(field, 0))
    step.zone_plan.fill_(1)
    step.dense_plan.fill_(1)
    step.buffers.list_count.fill_(1)
