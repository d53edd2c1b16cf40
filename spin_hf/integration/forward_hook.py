"""Wraps `forward` of model instances while one of their caches lives, to observe the calls that carry a `SpinCache`.

    model(...)  ->  hooks of the model  ->  model.forward = wrapped  ->  cache.calls, if the call brings a SpinCache
                                                                     ->  the previous forward

The model is wrapped, and the models inside it that users also call with a cache: `model.model`, the language model of a
vision-language model. The wrapper is a bound method on the instance, and the previous forward an attribute beside it. So
`copy.deepcopy` binds the copy's method to the copy, `pickle` finds the class's method, and code that unwraps bound methods
(`accelerate`) works. The class is not changed. The last cache restores the previous forward.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..attention import implementation
from . import prefill_hook
from .modules import modules_of
from .prefill_hook import ATTRIBUTE, CACHE_NAMES

_PREVIOUS = "_spin_hf_forward"
"""Instance attribute with the previous `forward`, None for the class's own. Numbered if an instance is wrapped twice."""

_key_of: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
"""Wrapper function -> name of the attribute with the previous forward."""
_users: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_lock = threading.RLock()
"""Held while forwards are wrapped. Reentrant, because the garbage collector may drop a cache, and so call `release`, inside."""

Wrapped = list["weakref.ref[nn.Module]"]


def new_inputs(kwargs: dict[str, Any]) -> Tensor | None:
    """The new tokens of a forward: ids [B, n] or embeddings [B, n, hidden size]; None if it has neither."""
    ids = kwargs.get("input_ids")
    new = kwargs.get("inputs_embeds") if ids is None else ids
    return new if isinstance(new, Tensor) and new.dim() > 1 else None


def unwrapped(model: Any) -> Any:
    """The model inside the wrappers of `torch.compile` and PEFT."""
    while True:
        inner = getattr(model, "_orig_mod", None)  # torch.compile
        if inner is None and hasattr(model, "get_base_model"):  # PEFT
            inner = model.get_base_model()
        if inner is None or inner is model:
            return model
        model = inner


def acquire(model: nn.Module) -> Wrapped:
    """Count one more cache of `model` and wrap its forwards. Returns the argument of `release`."""
    with _lock:
        modules = list(called_with_a_cache(model))
        for module in modules:
            _users[module] = _users.get(module, 0) + 1
            if not _is_wrapped(module):
                _wrap(module)
        prefill_hook.install(model)
    return [weakref.ref(module) for module in modules]


def acquire_again(wrapped: Wrapped) -> Wrapped:
    """Count one more cache of the same modules, which a living cache has acquired."""
    with _lock:
        for reference in wrapped:
            module = reference()
            if module is not None and module in _users:
                _users[module] += 1
    return list(wrapped)


def release(wrapped: Wrapped) -> None:
    """Count one cache less. The last one of a module unwraps its forward."""
    with _lock:
        for reference in wrapped:
            module = reference()
            if module is None or module not in _users:
                continue
            _users[module] -= 1
            if not _users[module]:
                del _users[module]
                _unwrap(module)
                prefill_hook.remove(module)


def called_with_a_cache(model: nn.Module) -> Iterator[nn.Module]:
    """The model, and the models inside it with a forward that takes a cache."""
    for module in modules_of(model):
        if module is model or (isinstance(module, PreTrainedModel) and _takes_cache(type(module))):
            yield module


def _takes_cache(kind: type[nn.Module]) -> bool:
    return not set(inspect.signature(kind.forward).parameters).isdisjoint(CACHE_NAMES)


def _is_wrapped(module: nn.Module) -> bool:
    return getattr(module.__dict__.get("forward"), "__func__", None) in _key_of


def without_wrapper(module: nn.Module) -> Any:
    """The forward that was set on a module instance, below this package's wrapper; None for the class's own."""
    forward = module.__dict__.get("forward")
    return module.__dict__[_key_of[forward.__func__]] if _is_wrapped(module) else forward  # type: ignore[union-attr]


def _wrap(module: nn.Module) -> None:
    before: Any = module.forward
    signature = inspect.signature(before)
    parameters = list(signature.parameters.values())
    # A wrapper of another library hides the names of the parameters.
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        names = list(inspect.signature(type(module).forward).parameters)[1:]
    else:
        names = [parameter.name for parameter in parameters]
    key = next(key for key in _keys() if key not in module.__dict__)

    @functools.wraps(getattr(before, "__func__", before))
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        stored = self.__dict__[key]
        given = {**dict(zip(names, args, strict=False)), **kwargs} if len(args) <= len(names) else kwargs
        name = next((name for name in CACHE_NAMES if given.get(name) is not None), CACHE_NAMES[0])
        calls = getattr(given.get(name), ATTRIBUTE, None)
        if torch.compiler.is_compiling():
            config = None if calls is None else calls.switched
            if stored is None:
                return _traced(config, type(self).forward, self, *args, **kwargs)
            return _traced(config, stored, *args, **kwargs)
        call = MethodType(type(self).forward, self) if stored is None else stored
        if calls is None:
            return call(*args, **kwargs)
        if len(args) > len(names):
            call = functools.partial(call, *args)
        return calls.run(self, call, given, name)

    if not hasattr(before, "__func__"):  # otherwise `inspect` finds the signature by `__wrapped__`
        me = inspect.Parameter("this", inspect.Parameter.POSITIONAL_ONLY)
        forward.__signature__ = signature.replace(parameters=[me, *parameters])  # type: ignore[attr-defined]
    _key_of[forward] = key
    module.__dict__[key] = module.__dict__.get("forward")
    module.__dict__["forward"] = MethodType(forward, module)


def _unwrap(module: nn.Module) -> None:
    """Restore the previous forward. If somebody has wrapped the forward since, ours stays inside, without effect."""
    if not _is_wrapped(module):
        return
    before = module.__dict__.pop(_key_of[module.__dict__["forward"].__func__])
    if before is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = before


def _keys() -> Iterator[str]:
    yield _PREVIOUS
    for number in itertools.count(2):
        yield f"{_PREVIOUS}_{number}"


def _traced(config: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The call, with `config` switched to "spin" if there is one. Dynamo can trace this: no lock and no `finally`."""
    if config is None:
        return call(*args, **kwargs)
    before = getattr(config, implementation.FIELD)
    setattr(config, implementation.FIELD, implementation.NAME)
    result = call(*args, **kwargs)
    setattr(config, implementation.FIELD, before)
    return result


def is_compiled(forward: Any) -> bool:
    """Whether a forward was made by `torch.compile`."""
    return hasattr(forward, "_torchdynamo_orig_callable")
