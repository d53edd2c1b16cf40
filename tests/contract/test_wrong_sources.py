"""`from_cache` with sources and masks that do not fit: refused, with the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from spin_hf import BatchSizeError, OptionError, OptionTypeError, SpinCache
from tests.support.mistakes import EXACT, assert_untouched, feed
from tests.support.zoo import subject_model


def dense(model: Any, tokens: int = 60) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    feed(model, cache, 0, tokens)
    return cache


def _change(index: int, change: Callable[[Tensor], Tensor], names: tuple[str, ...] = ("keys", "values")) -> Any:
    def changed(cache: DynamicCache) -> None:
        for name in names:
            setattr(cache.layers[index], name, change(getattr(cache.layers[index], name)))

    return changed


SOURCES: dict[str, tuple[Callable[[DynamicCache], None], type[Exception]]] = {
    "another batch": (_change(1, lambda states: states[:1]), OptionError),
    "fewer tokens": (_change(1, lambda states: states[:, :, :50]), OptionError),
    "more heads": (_change(1, lambda states: torch.cat([states, states], 1)), OptionError),
    "another size": (_change(0, lambda states: states[..., :8]), OptionError),
    "another dtype": (_change(1, lambda states: states.half()), OptionError),
    "whole numbers": (_change(0, lambda states: states.int()), OptionError),
    "values of another dtype": (_change(0, lambda states: states.half(), ("values",)), OptionError),
    "fewer values": (_change(0, lambda states: states[:, :, :9], ("values",)), OptionError),
    "three dimensions": (_change(0, lambda states: states[0]), OptionError),
    "an empty layer": (_change(1, lambda states: states[:, :, :0]), OptionError),
    "a layer less": (lambda cache: cache.layers.pop(), OptionError),
}


@pytest.mark.parametrize("name", SOURCES)
def test_sources_that_do_not_fit(name: str) -> None:
    model, (change, error) = subject_model("llama"), SOURCES[name]
    source = dense(model)
    change(source)
    with pytest.raises(error, match="pass"):
        SpinCache.from_cache(source, model.config, **EXACT)


MASKS: dict[str, tuple[Any, type[Exception]]] = {
    "another batch": (torch.ones(1, 60), BatchSizeError),
    "fewer tokens": (torch.ones(2, 59), BatchSizeError),
    "more tokens": (torch.ones(2, 61), BatchSizeError),
    "one dimension": (torch.ones(60), OptionTypeError),
    "four dimensions": (torch.ones(2, 1, 60, 60), OptionTypeError),
    "a list": ([[1] * 60] * 2, OptionTypeError),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_that_do_not_fit(name: str) -> None:
    model, (mask, error) = subject_model("llama"), MASKS[name]
    with pytest.raises(error, match=r"attention_mask.*pass"):
        SpinCache.from_cache(dense(model), model.config, attention_mask=mask, **EXACT)


def test_sources_of_another_kind() -> None:
    model, other = subject_model("llama"), subject_model("qwen3_next")
    with pytest.raises(OptionTypeError, match="DynamicCache"):
        SpinCache.from_cache([(torch.ones(1), torch.ones(1))], model.config)  # type: ignore[arg-type]
    source = DynamicCache()
    for index in range(len(DynamicCache(config=other.config).layers)):
        source.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), index)
    with pytest.raises(OptionError, match="layer"):
        SpinCache.from_cache(source, other.config)
    empty = SpinCache.from_cache(DynamicCache(config=model.config), model.config, **EXACT)
    feed(model, empty, 0, 60)
    assert_untouched(model, empty)
