"""`enable(model)`: a fresh SpinCache for every `generate` or `pipeline` call, without touching the calls.

    model.generate(...)  ->  transformers merges the generation configs
                         ->  model._prepare_cache_for_generation = wrapped  ->  a SpinCache, unless the call names another cache

The hook runs after transformers has merged arguments, the call's config and the model's config. State lives on the instance: a
stack of options, of which the last entry applies. A copy of an enabled model is enabled independently. A pickled one is a plain
model.
"""

from __future__ import annotations

import copy
import functools
from types import MethodType, TracebackType
from typing import Any

from transformers import GenerationMixin, PreTrainedModel

from .cache import SpinCache
from .errors import OptionTypeError
from .integration.forward_hook import unwrapped
from .integration.prefill_hook import CACHE_NAME, CACHE_NAMES

_HOOK = "_prepare_cache_for_generation"
_STATE = "_spin_hf_enabled"


class _Stack:
    """The options that are enabled on one instance.

    Attributes:
        options: token of each active `enable` -> its options; the last entry applies.
        before: the instance attribute that the hook replaced; None if there was none.
    """

    def __init__(self, before: Any) -> None:
        self.options: dict[object, dict[str, Any]] = {}
        self.before = before

    def __deepcopy__(self, memo: dict[int, Any]) -> _Stack:
        twin = _Stack(copy.deepcopy(self.before, memo))
        twin.options = copy.deepcopy(self.options, memo)
        return twin

    def __reduce__(self) -> Any:
        return dict, ()  # a pickled model is a plain model


class Enabled:
    """Returned by `enable`. As a context manager it undoes that call of `enable` at its end. It may be ignored."""

    def __init__(self, model: PreTrainedModel, token: object) -> None:
        self.model = model
        self._token = token

    def __enter__(self) -> PreTrainedModel:
        return self.model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        target = unwrapped(self.model)
        stack = target.__dict__.get(_STATE)
        if isinstance(stack, _Stack):
            stack.options.pop(self._token, None)
            if not stack.options:
                disable(target)


def enable(model: PreTrainedModel, **options: Any) -> Enabled:
    """Give every later `model.generate(...)`, and so every `pipeline` call, a fresh `SpinCache(model, **options)`.

    A call is left alone if it brings its own cache, or if an argument or a generation config sets `use_cache=False` or a
    `cache_implementation`. A second `enable` replaces the options. At the end of a context manager those before apply again.

    Args:
        model: may be compiled or have adapters; the inner model is enabled.
        options: as for `SpinCache`, including `method`.
    Returns:
        a context manager that undoes this call of `enable`.
    Raises:
        OptionTypeError: `model` has no `generate`.
        SpinError: as `SpinCache(model, **options)`, immediately.
    """
    target = unwrapped(model)
    if not hasattr(target, _HOOK):
        raise OptionTypeError(
            f"model: expected a model with generate(), got {type(model).__name__}; pass a causal language model"
        )
    SpinCache(target, **options)  # raises for bad options now, not at the first call
    stack = target.__dict__.get(_STATE)
    if not isinstance(stack, _Stack):
        stack = target.__dict__[_STATE] = _Stack(target.__dict__.get(_HOOK))
        target.__dict__[_HOOK] = MethodType(_prepare_cache, target)
    token = object()
    stack.options[token] = options
    return Enabled(model, token)


def disable(model: PreTrainedModel) -> None:
    """Undo all calls of `enable`. Does nothing if there were none."""
    target = unwrapped(model)
    stack = getattr(target, "__dict__", {}).pop(_STATE, None)
    if isinstance(stack, _Stack) and getattr(target.__dict__.get(_HOOK), "__func__", None) is _prepare_cache:
        del target.__dict__[_HOOK]
        if stack.before is not None:
            target.__dict__[_HOOK] = stack.before


@functools.wraps(getattr(GenerationMixin, _HOOK))
def _prepare_cache(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Wraps transformers' method: adds a SpinCache to the model's arguments, then calls it."""
    stack = self.__dict__.get(_STATE)
    before = stack.before if isinstance(stack, _Stack) else None
    if (
        isinstance(stack, _Stack)
        and all(model_kwargs.get(name) is None for name in CACHE_NAMES)
        and generation_config.use_cache
        and generation_config.cache_implementation is None
    ):
        *_, options = stack.options.values()
        model_kwargs[CACHE_NAME] = SpinCache(self, **options)
    call = MethodType(getattr(type(self), _HOOK), self) if before is None else before
    return call(generation_config, model_kwargs, *args, **kwargs)
