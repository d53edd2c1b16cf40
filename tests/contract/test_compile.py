"""torch.compile on the CPU: the decode forward compiles without a break, once, and gives the same tokens.

`test_exactness` runs every family through Dynamo (backend "eager"). Here are inductor, the ways in which users compile, and
values that must not be constants of a graph: lengths, batches, caches.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from spin_hf import SpinCache
from tests.support.cache_modes import run_compiled
from tests.support.compare import Trace, assert_same
from tests.support.memory import SMALL_ZONES, with_tight_gpu_memory
from tests.support.runs import generate
from tests.support.subjects import DenseSubject, SpinSubject, dense_subject
from tests.support.zoo import build_model, left_padded, random_tokens


def test_inductor() -> None:
    assert_same(run_compiled(SpinSubject("llama", from_config=True), "inductor"), run_compiled(dense_subject("llama")))


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_given_the_model(family: str) -> None:
    assert_same(run_compiled(SpinSubject(family)), run_compiled(dense_subject(family)))


def test_paged() -> None:
    expected = run_compiled(dense_subject("llama"))

    def run(cap: int) -> SpinSubject:
        subject = SpinSubject("llama", from_config=True, gpu_memory=cap, **SMALL_ZONES)
        assert_same(run_compiled(subject), expected)
        return subject

    subject = with_tight_gpu_memory(run)
    assert subject.caches[-1].stats().evictions > 0
    subject.caches[-1].check_integrity()


def test_selecting() -> None:
    subject = SpinSubject("llama", from_config=True, budget=56, recent_window=64)
    assert_same(run_compiled(subject), run_compiled(dense_subject("llama")))
    assert subject.caches[-1].stats().sparse_queries > 0


def test_generate_on_a_forward_that_the_user_compiled() -> None:
    torch._dynamo.reset()
    model = build_model("llama")
    model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]
    ids, mask = left_padded([50, 41])
    trace, expected = Trace(), Trace()
    subject, oracle = SpinSubject("llama"), DenseSubject("llama")
    subject.model = model
    for turn in range(2):
        cache = subject.new()
        trace.add_generated(f"call {turn}", generate(subject, ids, cache, attention_mask=mask, new_tokens=6))
        expected.add_generated(f"call {turn}", generate(oracle, ids, oracle.new(), attention_mask=mask, new_tokens=6))
    assert_same(trace, expected)


def _steps(forward: Any, model: Any, cache: Any, rows: int, trace: Trace, label: str, steps: int = 6) -> None:
    token = torch.full((rows, 1), 5)
    for step in range(steps):
        with torch.no_grad():
            logits = forward(input_ids=token, past_key_values=cache).logits
        trace.add_logits(f"{label} step {step}", logits)
        token = logits[:, -1:].argmax(-1)


def test_steps_without_a_mask_compile_once() -> None:
    """No masks, no positions: the shapes never change, so neither may the graph."""
    torch._dynamo.reset()
    counters.clear()
    model, trace, expected = build_model("llama"), Trace(), Trace()
    oracle = DenseSubject("llama")
    forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    cache, dynamic = SpinCache(model.config, budget=1 << 20), oracle.new()
    with torch.no_grad():
        model(random_tokens(1, 44), past_key_values=cache)
        oracle.model(random_tokens(1, 44), past_key_values=dynamic)
    _steps(forward, model, cache, 1, trace, "first", 2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        _steps(forward, model, cache, 1, trace, "then", 30)
    _steps(oracle.model.forward, oracle.model, dynamic, 1, expected, "first", 2)
    _steps(oracle.model.forward, oracle.model, dynamic, 1, expected, "then", 30)
    assert_same(trace, expected)
    assert cache.get_seq_length() == 44 + 32
    cache.check_integrity()


def test_eager_and_compiled_steps_mix_on_one_cache() -> None:
    """Eager steps continue after compiled ones and the other way round, with crops and reorders in between."""
    torch._dynamo.reset()
    model, traces = build_model("llama"), []
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    oracle = DenseSubject("llama")
    for subject, forward, cache in (
        (model, compiled, SpinCache(model.config, budget=1 << 20)),
        (oracle.model, oracle.model.forward, oracle.new()),
    ):
        trace = Trace()
        with torch.no_grad():
            subject(random_tokens(2, 44), past_key_values=cache)
        _steps(forward, subject, cache, 2, trace, "compiled", 5)
        cache.crop(-3)
        _steps(forward, subject, cache, 2, trace, "after a crop", 4)
        _steps(subject.forward, subject, cache, 2, trace, "eager", 4)
        cache.reorder_cache(torch.tensor([1, 1]))
        _steps(forward, subject, cache, 2, trace, "after a reorder", 4)
        assert cache.get_seq_length() == 58
        traces.append(trace)
    assert_same(*traces)
