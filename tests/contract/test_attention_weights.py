"""`output_attentions=True` returns the weights that were used, in the order of positions.

At full budget they equal those of eager attention on a DynamicCache, for every kind of layer. For sparse steps they must
reproduce the output.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from spin_hf import Quest, SpinCache
from spin_hf.attention.interface import spin_attention
from spin_hf.backends import attention_weights
from tests.support.cache_driver import CacheDriver, RandomKV, Shape, poisoned_memory, smallest_gpu_memory
from tests.support.conversation import random_pages
from tests.support.graph_recorder import capture_on_cpu
from tests.support.runs import generate
from tests.support.subjects import SpinSubject
from tests.support.zoo import build_model, left_padded, random_tokens

TOLERANCE = 1e-5
FAMILIES = [
    "llama",  # groups of query heads
    "gpt2",  # its forward drops the argument
    "gpt_neox",
    "gpt_oss",  # learned sinks, windows
    "gemma2",  # softcap, windows
    "gemma3_text",
    "qwen3_next",  # linear attention between
    "llama4_text",  # chunks
    "mimo_v2_flash",  # keys and values of different lengths
    "gemma4_text",  # layers that share keys
]


def weights_of(model: Any, cache: Any, ids: Tensor, mask: Tensor, stops: list[int]) -> list[tuple[Tensor, ...]]:
    """The weights of every layer, in one forward for each stop."""
    collected, start = [], 0
    for stop in stops:
        with torch.no_grad():
            out = model(
                ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, output_attentions=True,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop],
            )  # fmt: skip
        collected.append(out.attentions)
        start = stop
    return collected


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_at_full_budget_those_of_eager_attention(family: str, padded: bool) -> None:
    ids, mask = left_padded([60, 52]) if padded else (random_tokens(2, 60), torch.ones(2, 60, dtype=torch.long))
    eager, model = build_model(family, attention="eager"), build_model(family)
    stops = [50, 51, 52, 57, 58]
    expected = weights_of(eager, DynamicCache(config=eager.config), ids, mask, stops)
    actual = weights_of(model, SpinCache(model, budget=1 << 20), ids, mask, stops)
    assert sum(map(len, expected)) > 0
    start = 0
    for stop, theirs, ours in zip(stops, expected, actual, strict=True):
        assert [w.shape for w in ours] == [w.shape for w in theirs]
        real = mask[:, start:stop].bool()[:, None, :, None]
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.dtype == other.dtype
            assert float((mine - other).masked_fill(~real, 0.0).abs().max()) <= TOLERANCE
        start = stop


@pytest.mark.parametrize("family", ["mistral", "deepseek_v3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_models_without_paged_layers_give_what_they_gave(family: str, attention: str) -> None:
    model = build_model(family, attention=attention)
    ids, mask = left_padded([60, 52])
    given = [
        weights_of(model, cache, ids, mask, [50, 51]) for cache in (DynamicCache(config=model.config), SpinCache(model))
    ]
    assert bool(given[0][0]) == (attention == "eager")
    for theirs, ours in zip(*given, strict=True):
        assert len(theirs) == len(ours)
        assert all(map(torch.equal, theirs, ours))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss"])
@pytest.mark.parametrize("how", ["greedy", "sampled", "beams"])
def test_generate_returns_them(family: str, how: str) -> None:
    model, eager = build_model(family), build_model(family, attention="eager")
    ids, mask = left_padded([40, 33])
    options: dict[str, Any] = {"greedy": {}, "sampled": dict(do_sample=True), "beams": dict(num_beams=3)}[how]

    def run(model: Any, cache: Any) -> Any:
        torch.manual_seed(0)
        return model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5, output_attentions=True,
            return_dict_in_generate=True, **{"do_sample": False, **options},
        )  # fmt: skip

    theirs, ours = run(eager, DynamicCache(config=eager.config)), run(model, SpinCache(model, budget=1 << 20))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert [[w.shape for w in step] for step in ours.attentions] == [[w.shape for w in s] for s in theirs.attentions]
    for mine, other in zip(ours.attentions[1:], theirs.attentions[1:], strict=True):
        for a, b in zip(mine, other, strict=True):
            assert float((a - b).abs().max()) <= TOLERANCE


def test_tokens_do_not_depend_on_who_looks() -> None:
    """A sparse cache generates the same with and without weights."""
    ids, mask = left_padded([90, 71])
    outputs = []
    for looks in ({}, {"output_attentions": True}):
        subject = SpinSubject("llama", budget=16, recent_window=8)
        outputs.append(generate(subject, ids, subject.new(), attention_mask=mask, **looks))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert outputs[0].attentions is None
    assert [len(step) for step in outputs[1].attentions] == [2] * len(outputs[1].attentions)


SHAPE = Shape(layers=1, kv_heads=2, group=2, value_dim=5)
STOPS = [120, 121, 122, 124, 180, 181, 182]
METHODS: list[Any] = ["shadowkv", Quest(dense_layers=0), "retroinfer", "bisection", "fitted"]


def step(driver: CacheDriver, kv: RandomKV, start: int, stop: int) -> tuple[Tensor, Tensor]:
    driver.arguments["output_attentions"] = True
    outputs: list[Tensor] = []

    def record(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        out, weights = spin_attention(*args, **kwargs)
        assert weights is not None
        outputs.append(weights)
        return out, weights

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.support.cache_driver.spin_attention", record)
        (out,) = driver.step(kv, start, stop)
    return out, outputs[0]


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "softcap and sinks"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_of_sparse_steps(method: Any, extras: bool, tight: bool) -> None:
    """What is read has weight exp(score) over one denominator, and the output is what those weights make of the values."""
    kv = random_pages(SHAPE, 2, STOPS[-1], seed=3)
    logits = torch.tensor([1.0, -1.0, 0.5, 2.0]) if extras else None
    softcap = 2.0 if extras else None

    def run(cap: int | None) -> None:
        options: dict[str, Any] = {} if cap is None else dict(gpu_memory=cap)
        driver = CacheDriver(
            SHAPE, method=method, budget=16, num_sink_tokens=4, recent_window=8, softcap=softcap, sink_logits=logits,
            **options,
        )  # fmt: skip
        start, unread = 0, 0
        for stop in STOPS:
            out, weights = step(driver, kv, start, stop)
            assert weights.shape == (2, SHAPE.heads, stop - start, stop)
            keys, values, queries = (x[0].double() for x in (kv.keys, kv.values, kv.queries))
            keys, values = (x[:, :, :stop].repeat_interleave(SHAPE.group, 1) for x in (keys, values))
            scores = queries[:, :, start:stop] @ keys.transpose(2, 3) * SHAPE.key_dim**-0.5
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            causal = torch.arange(stop) <= torch.arange(start, stop)[:, None]
            assert not bool(weights.masked_fill(causal, 0.0).any())
            read, total = weights > 0, weights.double().sum(-1)
            for row in np.ndindex(*read.shape[:3]):
                share = weights[row].double().log() - scores[row]
                known = share[read[row]]
                assert float(known.max() - known.min()) < 1e-3, f"tokens [{start}, {stop}), row {row}"
            assert float(total.max()) <= 1 + 1e-5
            if method == "shadowkv" or isinstance(method, Quest):
                made = (weights.double() @ values).transpose(1, 2)
                assert float((made - out).abs().max()) <= 1e-5
                if not extras:
                    assert float(total.min()) >= 1 - 1e-5
            unread += int((causal & ~read).sum()) if stop - start == 1 else 0
            if stop - start > 8:
                assert bool((read | ~causal).all()), "more tokens than a step selects for attend to everything"
            start = stop
        assert unread > 0, "no step was sparse"
        driver.cache.check_integrity()

    with poisoned_memory():
        if tight:
            smallest_gpu_memory(run)
        else:
            run(None)


@pytest.mark.parametrize("method", ["retroinfer", "bisection", "fitted"])
def test_estimates_have_the_rest(method: str) -> None:
    """Where a method estimates pages, rows sum to less than 1: the rest is the weight of the estimates."""
    kv = random_pages(SHAPE, 2, 301, seed=4)
    driver = CacheDriver(SHAPE, method=method, budget=16, num_sink_tokens=4, recent_window=8)
    step(driver, kv, 0, 300)
    _, weights = step(driver, kv, 300, 301)
    assert float(weights.sum(-1).max()) < 1 - 1e-3


def test_one_warning(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_weights, "_warned", set())
    model, ids = build_model("llama"), random_tokens(1, 30)
    with caplog.at_level(logging.WARNING, logger="spin_hf"), torch.no_grad():
        for _ in range(2):
            model(ids, past_key_values=SpinCache(model), output_attentions=True)
    assert [r.message.startswith("output_attentions=True") for r in caplog.records] == [True]


def test_compiled_code_breaks_its_graph() -> None:
    """A step that returns weights runs eagerly inside of a compiled forward, and its tokens count."""
    torch._dynamo.reset()
    model, ids = build_model("llama"), random_tokens(1, 34)
    caches = [SpinCache(model, budget=1 << 20) for _ in range(2)]
    compiled, results = torch.compile(model.forward, backend="eager"), []
    with torch.no_grad():
        for cache, forward in zip(caches, (model.forward, compiled), strict=True):
            model(ids[:, :30], past_key_values=cache)
            outputs = [
                forward(input_ids=ids[:, i : i + 1], past_key_values=cache, output_attentions=i != 32)
                for i in range(30, 34)
            ]
            results.append(outputs)
            assert cache.get_seq_length() == 34
            cache.check_integrity()
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced.logits, eager.logits)
        for a, b in zip(traced.attentions or (), eager.attentions or (), strict=True):
            torch.testing.assert_close(a, b)
    torch._dynamo.reset()


@pytest.mark.skipif(sys.platform != "linux" or os.environ.get("TRITON_INTERPRET") != "1", reason="interpreted kernels")
@pytest.mark.parametrize("method", ["shadowkv", "bisection"])
def test_captured_steps_go_on_behind_one_that_returns_weights(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that returns weights runs eagerly by the reference, between replays of a graph."""
    model, ids = build_model("llama").eval(), random_tokens(2, 60)
    recorder = capture_on_cpu(monkeypatch)
    results: list[list[Tensor]] = []
    for rerank_factor in (set(), {3, 6}):
        cache, logits = SpinCache(model, method, budget=16, recent_window=8), []
        with torch.no_grad():
            model(ids[:, :50], past_key_values=cache)
            for i in range(10):
                before = recorder.replays
                out = model(
                    input_ids=ids[:, 50 + i : 51 + i], past_key_values=cache, output_attentions=i in rerank_factor
                )
                logits.append(out.logits)
                assert (out.attentions is not None) == (i in rerank_factor)
                if i in rerank_factor:
                    assert recorder.replays == before
                    assert [w.shape for w in out.attentions] == [(2, 4, 1, 51 + i)] * 2
                    assert float(out.attentions[0].sum(-1).min()) > 0.2
        cache.check_integrity()
        assert recorder.replays > 0
        results.append(logits)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_weights_of_a_given_mask() -> None:
    model, ids = build_model("llama"), random_tokens(2, 40)
    given = torch.rand(2, 4, 40, 40) < 0.5
    given |= torch.eye(40, dtype=torch.bool)
    with torch.no_grad():
        out = model(ids, attention_mask=given, past_key_values=SpinCache(model), output_attentions=True)
    for weights in out.attentions:
        assert not bool(weights.masked_fill(given, 0.0).any())
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 40))


def test_what_a_method_reads_shows() -> None:
    """Sinks, the recent window and at most the budget."""
    kv = random_pages(SHAPE, 1, 201, seed=5)
    driver = CacheDriver(SHAPE, method=Quest(dense_layers=0), budget=32, num_sink_tokens=4, recent_window=16)
    step(driver, kv, 0, 200)
    _, weights = step(driver, kv, 200, 201)
    read = weights[0, :, 0] > 0
    assert bool(read[:, :4].all())
    assert bool(read[:, -16:].all())
    assert int(read.sum(1).max()) <= 32 + 16 + 3 * 16
