"""The parts of transformers that `spin_hf/integration/deferred_stop.py` relies on: the stop decision may be read late, and a
static method decides whether it may.
"""

from __future__ import annotations

import gc
import inspect
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.generation import utils

from spin_hf.integration import deferred_stop
from tests.support.zoo import build_model, random_tokens


@pytest.fixture(autouse=True)
def _no_cache_widens_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers answers by itself, whatever caches other tests have left."""
    gc.collect()
    if deferred_stop._users:
        monkeypatch.setattr(deferred_stop._CHECK, "is_supported", staticmethod(deferred_stop._previous))


def test_it_is_there() -> None:
    """Without it `generate` would silently wait for every step."""
    assert deferred_stop._CHECK is utils.DeferredStopCheck
    assert {"device", "cache", "is_assistant"} <= set(inspect.signature(deferred_stop._CHECK.is_supported).parameters)


def test_generate_asks_with_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = build_model("llama"), []
    cache = DynamicCache(config=model.config)

    def noting(*args: Any, original: Any = deferred_stop._CHECK.is_supported, **kwargs: Any) -> bool:
        seen.append(inspect.signature(original).bind(*args, **kwargs).arguments)
        return bool(original(*args, **kwargs))

    monkeypatch.setattr(deferred_stop._CHECK, "is_supported", staticmethod(noting))
    model.generate(random_tokens(1, 9), past_key_values=cache, max_new_tokens=2, do_sample=False)
    assert [given["cache"] is cache for given in seen] == [True]
    assert seen[0]["device"] == torch.device("cpu")
    assert not seen[0]["is_assistant"]
