"""Serves models that drop their cache in `prepare_inputs_for_generation`: all tokens are read again, into the same cache.

    prepare_inputs_for_generation(ids, cache=c)      the model drops c, and its forward would make a DynamicCache
    └── wrapped while a cache of such a model lives  c.reset(), and all tokens go to c

Phi-3, phimoe and phi4_multimodal rotate all keys differently beyond `original_max_position_embeddings` tokens, so the keys in
the cache become invalid there. The wrapper is on the class, so copies of a model carry no trace of it. Calls with any other
cache pass through unchanged.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
import weakref
from typing import Any

from transformers import Cache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .forward_hook import CACHE_NAMES

logger = logging.getLogger("spin_hf")

_METHOD = "prepare_inputs_for_generation"
_served: weakref.WeakSet[Cache] = weakref.WeakSet()
_users: dict[type, int] = {}
_before: dict[type, Any] = {}
"""The method that a class defines itself; None if it inherits one."""
_lock = threading.RLock()


def acquire(cache: Cache, model: Any, config: Any) -> None:
    """Keep the model from dropping `cache`, while the cache lives.

    Args:
        model: the model or the config that the cache was made from.
        config: the config of its decoder.
    """
    if not hasattr(config, "original_max_position_embeddings"):
        return
    kinds = _kinds(model)
    with _lock:
        for kind in kinds:
            _users[kind] = _users.get(kind, 0) + 1
            if _users[kind] == 1:
                _before[kind] = kind.__dict__.get(_METHOD)
                setattr(kind, _METHOD, _wrapped(getattr(kind, _METHOD)))
    _served.add(cache)
    weakref.finalize(cache, _release, kinds)


def _kinds(model: Any) -> list[type]:
    """The classes of a model and of the model inside an adapter or `torch.compile`; for a config, its causal model class."""
    if model is None:
        return []
    inner = getattr(model, "_orig_mod", model)
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    found = [type(inner), type(base), MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model), None)]
    return [kind for kind in dict.fromkeys(found) if kind is not None and hasattr(kind, _METHOD)]


def _release(kinds: list[type]) -> None:
    with _lock:
        for kind in kinds:
            _users[kind] -= 1
            if _users[kind]:
                continue
            before = _before.pop(kind)
            if before is None:
                delattr(kind, _METHOD)
            else:
                setattr(kind, _METHOD, before)


def _wrapped(prepare: Any) -> Any:
    """`prepare`, except that a served cache is reset and gets all tokens instead of being dropped."""

    @functools.wraps(prepare)
    def prepare_inputs_for_generation(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = prepare(self, input_ids, *args, **kwargs)
        name = next((name for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        cache = None if name is None else kwargs[name]
        if cache is None or cache not in _served or any(inputs.get(name) is not None for name in CACHE_NAMES):
            return inputs
        assert name is not None
        again = kwargs | {name: None, "next_sequence_length": None}
        if cache.get_seq_length():
            logger.info("%s rotates keys otherwise from here on: its cache reads all tokens again", type(self).__name__)
            if kwargs.get("inputs_embeds") is None:
                again["is_first_iteration"] = True  # images are read again too
        inputs = prepare(self, input_ids, *args, **again)
        cache.reset()
        inputs[_name_in(self, name)] = cache
        return inputs

    return prepare_inputs_for_generation


def _name_in(model: Any, given: str) -> str:
    """The name of the cache among the parameters of the model's forward."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), given)
