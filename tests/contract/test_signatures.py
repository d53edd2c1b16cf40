"""Functions that replace transformers' own take their arguments in transformers' order, under transformers' names.

Libraries wrap every registered attention function and pass some arguments by position. transformers calls cache methods both by
position and by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from spin_hf import SpinCache
from spin_hf.attention.interface import spin_attention, spin_mask
from spin_hf.layer import SpinLayer
from tests.support.runs import generate
from tests.support.subjects import DenseSubject, SpinSubject
from tests.support.zoo import build_model, left_padded, random_tokens

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def by_position(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(function).parameters.values() if p.kind in POSITIONAL]


def assert_callable_like(ours: Callable[..., Any], theirs: Callable[..., Any]) -> None:
    """Whatever can be given to `theirs`, by position or by name, means the same to `ours`; defaults are equal."""
    mine, kinds = by_position(ours), {p.kind for p in inspect.signature(ours).parameters.values()}
    for index, parameter in enumerate(by_position(theirs)):
        if index < len(mine):
            assert mine[index].name == parameter.name
            assert mine[index].default == parameter.default
        else:
            assert set(VARIABLE) <= kinds, f"{parameter.name} cannot be given"
    for extra in mine[len(by_position(theirs)) :]:
        assert extra.default is not inspect.Parameter.empty, f"{extra.name} would be missing"
    for kind in VARIABLE:
        assert kind in kinds or kind not in {p.kind for p in inspect.signature(theirs).parameters.values()}


def overridden() -> list[tuple[type, type, str]]:
    pairs = [(SpinCache, Cache), (SpinCache, DynamicCache), (SpinLayer, CacheLayerMixin), (SpinLayer, DynamicLayer)]
    found = []
    for ours, theirs in pairs:
        for name in dir(theirs):
            mine, original = getattr(ours, name, None), getattr(theirs, name)
            if not name.startswith("_") and inspect.isfunction(mine) and mine is not original:
                found.append((ours, theirs, name))
    return found


@pytest.mark.parametrize(("ours", "theirs", "name"), overridden(), ids=lambda x: getattr(x, "__name__", x))
def test_methods_of_caches(ours: type, theirs: type, name: str) -> None:
    assert_callable_like(getattr(ours, name), getattr(theirs, name))


def test_methods_of_caches_are_found() -> None:
    found = {(ours.__name__, name) for ours, _, name in overridden()}
    assert {("SpinCache", "update"), ("SpinCache", "crop"), ("SpinLayer", "get_mask_sizes")} <= found


@pytest.mark.parametrize("theirs", [sdpa_attention_forward, flash_attention_forward])
def test_attention_function(theirs: Callable[..., Any]) -> None:
    """The arguments that all of transformers' attention functions share have the same positions."""
    common = [p.name for p in by_position(theirs)][: [p.name for p in by_position(theirs)].index("scaling") + 1]
    assert [p.name for p in by_position(spin_attention)][: len(common)] == common


def test_attention_function_is_called_by_position() -> None:
    """Each position means what it means to transformers' sdpa."""
    order = [p.name for p in by_position(sdpa_attention_forward)]
    assert [p.name for p in by_position(spin_attention)] == order[: len(by_position(spin_attention))]


@pytest.mark.parametrize("name", ["sdpa", "eager", "flash_attention_2", "flex_attention"])
def test_mask_function(name: str) -> None:
    common = [p.name for p in by_position(ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])]
    order = [p.name for p in by_position(ALL_MASK_ATTENTION_FUNCTIONS[name])]
    assert [p.name for p in by_position(spin_mask)] == common == order[: len(common)]
    assert inspect.signature(spin_mask).parameters["mask_function"].default is causal_mask_function


def test_wrapped_forward() -> None:
    model = build_model("llama")
    before = inspect.signature(model.forward)
    cache = SpinCache(model)
    assert inspect.signature(model.forward) == before
    del cache


@contextmanager
def every_attention_function_wrapped() -> Iterator[list[str]]:
    """As libraries that prune caches do it: positions for six arguments, names for the rest."""
    called: list[str] = []

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(
            module: torch.nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, dropout: Any, **kwargs: Any
        ) -> Any:
            called.append(name)
            return function(module, query, key, value, attention_mask, dropout, **kwargs)

        return wrapper

    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    for name, function in before.items():
        ALL_ATTENTION_FUNCTIONS[name] = wrap(name, function)
    try:
        yield called
    finally:
        for name, function in before.items():
            ALL_ATTENTION_FUNCTIONS[name] = function


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_every_attention_function_wrapped(family: str) -> None:
    ids, mask = left_padded([50, 41])
    spin, dense = SpinSubject(family), DenseSubject(family)
    with every_attention_function_wrapped() as called:
        for _ in range(2):  # a wrapper stays when its cache is gone
            got = generate(spin, ids, spin.new(), attention_mask=mask, new_tokens=6)
            expected = generate(dense, ids, dense.new(), attention_mask=mask, new_tokens=6)
            assert torch.equal(got.sequences, expected.sequences)
    assert "spin" in called


def test_all_by_position() -> None:
    """The first six arguments have the same effect by position and by name."""
    model, ids = build_model("llama"), random_tokens(1, 20)
    outputs = []
    for wrapped in (False, True):
        cache = SpinCache(model, budget=1 << 20)
        with torch.no_grad():
            if wrapped:
                with every_attention_function_wrapped():
                    outputs.append(model(ids, past_key_values=cache).logits)
            else:
                outputs.append(model(ids, past_key_values=cache).logits)
    assert torch.equal(*outputs)
