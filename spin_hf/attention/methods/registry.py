"""The methods by name. A new method adds its class to `METHODS`."""

from __future__ import annotations

from ...config import require_count, shown
from ...errors import OptionError, OptionTypeError
from .base import Method
from .bisection import Bisection
from .clustering import ClusteringMethod
from .fitted import Fitted
from .quest import Quest
from .retroinfer import RetroInfer
from .seer import SeerAttention
from .shadowkv import ShadowKV

_MOST_PAGE_TOKENS = 1 << 15

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (ShadowKV, Bisection, RetroInfer, SeerAttention, Quest, Fitted)
}


def resolve_method(method: str | Method) -> Method:
    """The method of a name, with default parameters; a method object is returned as it is.

    Raises:
        OptionTypeError, OptionError: neither a method nor a known name, or a class attribute of the method is out of range.
    """
    known = ", ".join(repr(name) for name in METHODS)
    if isinstance(method, Method):
        _check_numbers(method)
        return method
    if not isinstance(method, str):
        raise OptionTypeError(
            f"method: expected a name ({known}) or a method object, got {type(method).__name__}; "
            "pass a name or ShadowKV()"
        )
    if method not in METHODS:
        raise OptionError(
            f"method: unknown method {shown(method)}; pass one of {known}, or a method object such as ShadowKV()"
        )
    return METHODS[method]()


def _check_numbers(method: Method) -> None:
    """Check class attributes about pages and spans. Methods check their parameters themselves."""
    name = type(method).__name__
    require_count(f"{name}: page_size", method.page_size, 1, _MOST_PAGE_TOKENS, example=8)
    if isinstance(method, ClusteringMethod):
        require_count(f"{name}: span_tokens", method.span_tokens, 1, example=8192)
        require_count(f"{name}: cluster_interval", method.cluster_interval, 1, example=1024)
        require_count(f"{name}: num_observation_queries", method.num_observation_queries, 0, _MOST_PAGE_TOKENS)
