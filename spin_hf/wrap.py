"""`model.forward` on the instance, wrapped for as long as a cache of the model lives.

    model(...)  ->  hooks of the model  ->  model.forward = wrapped  ->  cache.steps, if the call brings such a cache
                                                                     ->  the forward that stood there

As accelerate does it: the class is not touched, and the last cache to go puts back what stood there.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

ATTRIBUTE = "steps"
"""Where a cache keeps what runs its calls: `run(model, forward, kwargs, name)`."""

CACHE_NAMES = ("cache", "past_key_values")
"""What transformers calls the cache among a forward's arguments: from 5.24 on, and before."""


class WrappedForward:
    """The forward of one model."""

    __signature__: inspect.Signature

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)
        self.previous: Callable[..., Any] | None = model.__dict__.get("forward")
        """What stood on the instance; None for the class's own."""
        self.users = 0
        functools.update_wrapper(self, model.forward)
        del self.__wrapped__  # type: ignore[attr-defined]  # a bound method would keep the model alive
        self.__signature__ = inspect.signature(model.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model()
        name = next((name for name in CACHE_NAMES if kwargs.get(name) is not None), CACHE_NAMES[0])
        steps = getattr(kwargs.get(name), ATTRIBUTE, None)
        assert model is not None
        forward = self.previous or functools.partial(type(model).forward, model)
        if steps is None or len(args) > 1 or torch.compiler.is_compiling() or _is_compiled(forward):
            return forward(*args, **kwargs)
        if args:
            kwargs["input_ids"] = args[0]
        return steps.run(model, forward, kwargs, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        """A copied model calls its own forward."""
        model = self.model()
        assert model is not None
        return functools.partial(type(model).forward, memo[id(model)])

    def __reduce__(self) -> Any:
        raise TypeError("a model with a living SpinCache cannot be pickled; delete the cache first")


_wrapped: weakref.WeakKeyDictionary[nn.Module, WrappedForward] = weakref.WeakKeyDictionary()
_lock = threading.RLock()
"""Held while forwards are wrapped and counted; the garbage collector may drop a cache, and so come here, inside as well."""


def acquire(model: nn.Module) -> weakref.ref[nn.Module]:
    """Count one more cache of `model` and wrap its forward; returns what `release` takes."""
    with _lock:
        wrapped: Any = _wrapped.get(model)
        if wrapped is None or model.__dict__.get("forward") is not wrapped:
            wrapped = WrappedForward(model)
            _wrapped[model] = wrapped
            model.__dict__["forward"] = wrapped
        wrapped.users += 1
    return weakref.ref(model)


def release(reference: weakref.ref[nn.Module]) -> None:
    """Count one cache less; the last one unwraps the forward."""
    model = reference()
    with _lock:
        if model is None or model not in _wrapped:
            return
        wrapped = _wrapped[model]
        wrapped.users -= 1
        if wrapped.users == 0 and model.__dict__.get("forward") is wrapped:
            del _wrapped[model]
            if wrapped.previous is None:
                del model.__dict__["forward"]
            else:
                model.__dict__["forward"] = wrapped.previous


def _is_compiled(forward: Any) -> bool:
    return hasattr(forward, "_torchdynamo_orig_callable")
