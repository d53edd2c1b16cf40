"""Wraps `generate`'s prefill on model instances while one of their caches lives, to see whole prompts.

    model.generate(ids, past_key_values=cache)  ->  model._prefill = wrapped  ->  cache.calls: before_prompt, after_prompt
                                                                              ->  transformers' method, which cuts off what
                                                                                  the cache holds

In between `cache.calls.expecting` says how long a prompt will be that `generate` reads in chunks of its own.

The wrapper is a bound method on the instance, as in `forward_hook.py`. It does nothing for other caches.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from types import MethodType
from typing import Any

import transformers
from packaging.version import Version
from torch import nn
from transformers import GenerationMixin

ATTRIBUTE = "calls"
"""The attribute of a cache that runs the calls of its model: `run(...)` a forward, `before_prompt(...)` a prefill."""

CACHE_NAMES = ("cache", "past_key_values")
"""Names of the cache argument of a forward: from transformers 5.24 on, and before."""
CACHE_NAME = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"
"""That of the transformers which is installed."""

_HOOK = "_prefill"


def install(model: nn.Module) -> None:
    """Wrap the prefill of a model that can generate, unless that was done."""
    if isinstance(model, GenerationMixin) and _HOOK not in model.__dict__:
        model.__dict__[_HOOK] = MethodType(_prefill, model)


def remove(model: nn.Module) -> None:
    """Undo `install`."""
    if getattr(model.__dict__.get(_HOOK), "__func__", None) is _prefill:
        del model.__dict__[_HOOK]


@functools.wraps(getattr(GenerationMixin, _HOOK))
def _prefill(
    self: Any, input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    cache = next((model_kwargs[name] for name in CACHE_NAMES if model_kwargs.get(name) is not None), None)
    mask, call = model_kwargs.get("attention_mask"), getattr(type(self), _HOOK)
    is_first = args[0] if args else kwargs.get("is_first_iteration", True)
    width = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
    # Ids that the mask is longer than are the new ones only.
    whole = is_first and model_kwargs.get("inputs_embeds") is None and width == input_ids.shape[1]
    if not whole or getattr(cache, ATTRIBUTE, None) is None:
        return call(self, input_ids, generation_config, model_kwargs, *args, **kwargs)
    calls = getattr(cache, ATTRIBUTE)
    calls.before_prompt(cache, input_ids, mask)
    in_chunks = getattr(generation_config, "prefill_chunk_size", None) is not None
    with calls.expecting(input_ids, mask) if in_chunks else nullcontext():
        output = call(self, input_ids, generation_config, model_kwargs, *args, **kwargs)
    calls.after_prompt(cache, input_ids, mask)
    return output
