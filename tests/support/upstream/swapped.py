"""A plugin for pytest that lets transformers' own generation tests run with SpinCache in the place of DynamicCache.

    PYTHONPATH=tests/support/upstream:. python -m pytest -p swapped transformers/tests/models/llama/test_modeling_llama.py

By this name, as transformers' tests are a package `tests` too.

Where `generate` would make a DynamicCache it makes what SPIN_HF_UPSTREAM_CACHE says:

    dynamic    DynamicCache: what fails here is not ours
    exact      budget beyond the context
    tiered     the same with the smallest `gpu_memory` that `plan` allows for the call
    small      a budget of one page, for crashes

Only what GenerationTesterMixin defines is run, not the other tests of a file.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from transformers import DynamicCache
from transformers.generation.utils import GenerationMixin

from spin_hf import SpinCache, plan

KIND = os.environ.get("SPIN_HF_UPSTREAM_CACHE", "exact")
NAMES = ("cache", "past_key_values")
ZONES: dict[str, Any] = dict(num_sink_tokens=1, recent_window=1)
OPTIONS: dict[str, dict[str, Any]] = {
    "exact": dict(budget=1 << 20),
    "tiered": dict(budget=1 << 20, **ZONES),
    "small": dict(budget=1, **ZONES),
}
made: list[int] = [0]
"""How many caches were swapped in."""
_prepare = GenerationMixin._prepare_cache_for_generation


def _options(model: Any, config: Any, batch_size: int, length: int) -> dict[str, Any]:
    options = dict(OPTIONS[KIND])
    if KIND != "exact":
        rows = batch_size * max(config.num_beams, config.num_return_sequences)
        planned = plan(model, batch_size=rows, context_length=max(1, length), **options)
        if planned.paged_layers:
            options["gpu_memory"] = planned.smallest_gpu_memory
    return options


def _prepare_swapped(
    self: Any, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, length: int
) -> Any:
    given = {name: model_kwargs.get(name) for name in NAMES}
    result = _prepare(self, generation_config, model_kwargs, mode, batch_size, length)
    for name in NAMES:
        cache = model_kwargs.get(name)
        if type(cache) is DynamicCache and cache is not given[name] and not cache.offloading:
            swapped = SpinCache(self, **_options(self, generation_config, batch_size, length))
            if generation_config.is_assistant:
                swapped.activate_past_recording()
            model_kwargs[name] = swapped
            made[0] += 1
    return result


def pytest_configure(config: pytest.Config) -> None:
    if KIND != "dynamic":
        GenerationMixin._prepare_cache_for_generation = _prepare_swapped


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = [item for item in items if _is_generation(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


def _is_generation(item: pytest.Item) -> bool:
    owner, name = getattr(item, "cls", None), getattr(item, "originalname", item.name)
    mixins = [base for base in getattr(owner, "__mro__", ()) if base.__name__ == "GenerationTesterMixin"]
    return any(hasattr(mixin, name) for mixin in mixins)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"SpinCache was made {made[0]} times ({KIND})")
