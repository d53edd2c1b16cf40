"""The methods by name. A new method adds its class to `METHODS`."""

from __future__ import annotations

from ..errors import OptionError, OptionTypeError
from .bisection import Bisection
from .partition import Method
from .quest import Quest
from .retroinfer import RetroInfer
from .seer import SeerAttention
from .shadowkv import ShadowKV

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (ShadowKV, Bisection, RetroInfer, SeerAttention, Quest)
}


def resolve_method(method: str | Method) -> Method:
    """A method from its name (with the published parameters) or as given.

    Raises:
        OptionTypeError, OptionError: neither a method nor a known name.
    """
    known = ", ".join(repr(name) for name in METHODS)
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        raise OptionTypeError(
            f"method: expected a name ({known}) or a method object, got {type(method).__name__}; "
            "pass a name or ShadowKV()"
        )
    if method not in METHODS:
        raise OptionError(
            f"method: unknown method {method!r}; pass one of {known}, or a method object such as ShadowKV()"
        )
    return METHODS[method]()
