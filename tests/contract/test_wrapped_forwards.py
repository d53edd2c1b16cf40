"""A model's forward is wrapped while a cache of it exists, works with other wrappers, and is restored afterwards."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

from spin_hf import SpinCache
from spin_hf.integration import forward_hook
from tests.support.compare import Trace, assert_same
from tests.support.runs import EVERYTHING, generate
from tests.support.subjects import DenseSubject, SpinSubject
from tests.support.zoo import build_model, random_tokens


def forwards(model: nn.Module) -> dict[str, Any]:
    return {name: module.__dict__["forward"] for name, module in model.named_modules() if "forward" in module.__dict__}


def test_forwards_come_back_when_the_last_cache_goes() -> None:
    model = build_model("llama")
    first, second = SpinCache(model), SpinCache(model)
    wrapped = forwards(model)
    assert set(wrapped) == {"", "model"}
    assert all(isinstance(forward, MethodType) for forward in wrapped.values())
    assert inspect.signature(model.forward) == inspect.signature(MethodType(type(model).forward, model))
    del first
    gc.collect()
    assert forwards(model) == wrapped
    del second
    gc.collect()
    assert not forwards(model)
    assert not [name for name in model.__dict__ if "spin" in name]


def test_two_models_that_share_a_part() -> None:
    """The forward of the shared module is wrapped while a cache of either model exists."""
    first = build_model("llama")
    second = copy.deepcopy(first)
    second.model = first.model
    of_first, of_second = SpinCache(first), SpinCache(second)
    del of_first
    gc.collect()
    assert set(forwards(second)) == {"", "model"}
    del of_second
    gc.collect()
    assert not forwards(second)
    assert not forwards(first)


@pytest.mark.parametrize("order", ["cache, wrapper, cache", "wrapper, cache"])
def test_a_wrapper_of_somebody_else(order: str) -> None:
    """As accelerate's hooks: called once for each call, and left in place."""
    model, calls = build_model("llama"), []
    first = SpinCache(model, **EVERYTHING) if order.startswith("cache") else None
    inner = model.forward

    @functools.wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    model.forward = outer  # type: ignore[method-assign]
    if order.startswith("cache"):
        del first
        gc.collect()
    cache = SpinCache(model, **EVERYTHING)
    subject, oracle = SpinSubject("llama"), DenseSubject("llama")
    subject.model = model
    trace, expected = Trace(), Trace()
    trace.add_generated("wrapped", generate(subject, random_tokens(1, 30), cache, new_tokens=4))
    expected.add_generated("wrapped", generate(oracle, random_tokens(1, 30), oracle.new(), new_tokens=4))
    assert_same(trace, expected)
    assert len(calls) == 4
    del cache
    gc.collect()
    assert model.forward is outer
    assert torch.equal(model(random_tokens(1, 9)).logits, oracle.model(random_tokens(1, 9)).logits)


@pytest.mark.parametrize("prepared_first", [False, True])
def test_a_forward_that_is_taken_apart(prepared_first: bool) -> None:
    """As accelerate's `unwrap_model(keep_fp32_wrapper=False)`: peels `__wrapped__`, and binds what is left to the model."""
    model, oracle = build_model("llama"), DenseSubject("llama").model
    cache = None if prepared_first else SpinCache(model, **EVERYTHING)
    original = model.forward
    model._original_forward = original

    @functools.wraps(original.__func__)
    def converted(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original.__func__(self, *args, **kwargs)

    model.forward = MethodType(converted, model)  # type: ignore[method-assign]
    if prepared_first:
        cache = SpinCache(model, **EVERYTHING)
    forward = model.forward
    model.__dict__.pop("_original_forward")
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
        if forward == original:
            break
    model.forward = MethodType(forward, model)  # type: ignore[method-assign]
    ids = random_tokens(1, 30)
    torch.testing.assert_close(model(ids).logits, oracle(ids).logits)
    torch.testing.assert_close(model(input_ids=ids).logits, oracle(ids).logits)
    name = "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"  # of the bare function
    torch.testing.assert_close(model(ids, **{name: cache}).logits, oracle(ids).logits)
    torch.testing.assert_close(
        model(ids[:, :1], **{name: cache}).logits, oracle(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
    )
    del cache
    gc.collect()
    assert not [module for module in forwards(model) if module]
    torch.testing.assert_close(model(ids).logits, oracle(ids).logits)


def test_other_weights_for_one_call() -> None:
    """`functional_call` puts other tensors under the model's names."""
    model = build_model("llama")
    other = {name: parameter * 0.5 for name, parameter in model.named_parameters()}
    ids, expected = random_tokens(1, 20), copy.deepcopy(model)
    expected.load_state_dict(other, strict=False)
    cache = SpinCache(model, **EVERYTHING)
    logits = torch.func.functional_call(model, other, (ids,), {"past_key_values": cache}).logits
    torch.testing.assert_close(logits, expected(ids).logits)


def test_what_wraps_a_model_is_seen_through() -> None:
    model = build_model("llama")
    compiled = torch.compile(model, backend="eager")
    assert forward_hook.unwrapped(compiled) is model
    subject, oracle = SpinSubject("llama"), DenseSubject("llama")
    subject.model = model
    trace, expected = Trace(), Trace()
    trace.add_generated("", generate(subject, random_tokens(1, 30), SpinCache(compiled, **EVERYTHING), new_tokens=4))
    expected.add_generated("", generate(oracle, random_tokens(1, 30), oracle.new(), new_tokens=4))
    assert_same(trace, expected)
