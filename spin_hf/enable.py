"""`enable(model)`: a fresh SpinCache for every `generate` or `pipeline` call, without touching the calls."""

from __future__ import annotations

import functools
from types import TracebackType
from typing import Any

import transformers
from packaging.version import Version
from transformers import PreTrainedModel

from .cache import SpinCache
from .errors import OptionTypeError
from .wrap import CACHE_NAMES

_CACHE_NAME = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"
_ORIGINAL = "_spin_hf_generate"


class Enabled:
    """What `enable` returns: leave it alone, or use it as a context manager that calls `disable` at its end."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __enter__(self) -> PreTrainedModel:
        return self.model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        disable(self.model)


def enable(model: PreTrainedModel, **options: Any) -> Enabled:
    """Give every later `model.generate(...)` (so every `pipeline` call too) a fresh `SpinCache(model, **options)`.

    A call that brings its own cache or `cache_implementation`, or says `use_cache=False`, is left alone.
    Calling it again replaces the options.

    Args:
        options: as for `SpinCache`, `method` included.
    Raises:
        what `SpinCache` raises, at once.
    """
    if not hasattr(model, "generate"):
        raise OptionTypeError(
            f"model: expected a model with generate(), got {type(model).__name__}; pass a causal language model"
        )
    SpinCache(model, **options)  # refuses bad options now, not at the first call
    disable(model)
    generate, wrapped_before = model.generate, model.__dict__.get("generate")

    @functools.wraps(generate)
    def generate_with_spin(*args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config") or model.generation_config
        asked = {name: kwargs.get(name, getattr(config, name, None)) for name in ("use_cache", "cache_implementation")}
        if (
            all(kwargs.get(name) is None for name in CACHE_NAMES)
            and asked["use_cache"] is not False
            and asked["cache_implementation"] is None
        ):
            kwargs[_CACHE_NAME] = SpinCache(model, **options)
        return generate(*args, **kwargs)

    model.generate = generate_with_spin
    setattr(model, _ORIGINAL, wrapped_before)
    return Enabled(model)


def disable(model: PreTrainedModel) -> None:
    """Undo `enable`; nothing happens if it was not called."""
    if _ORIGINAL in model.__dict__:
        wrapped_before = model.__dict__.pop(_ORIGINAL)
        del model.__dict__["generate"]
        if wrapped_before is not None:
            model.generate = wrapped_before
