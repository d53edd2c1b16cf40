"""Read-only tensors, for keys and values that a cache exposes.

Keys and values are gathered from pages on access, so a write would change a copy and be lost. Views of a read-only tensor are
read-only too; other results computed from it are ordinary tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import CacheStateError

_AUGMENTED = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_WRITES = {"__setitem__", "__delitem__", "__set__", *(f"__i{name}__" for name in _AUGMENTED)}


class ReadOnlyTensor(Tensor):
    """A tensor that raises CacheStateError on writes."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Reject writes and run everything else. Views stay read-only."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        in_place = name in _WRITES or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_")
        written = [args[0] if args and in_place else None, *pytree.tree_leaves(kwargs.get("out"))]
        if any(isinstance(each, ReadOnlyTensor) for each in written):
            raise CacheStateError(
                f"{name}: expected keys and values of a SpinCache to be read only, got a write; they are copies of what its "
                "pages hold. Change them in a DynamicCache and take that over with SpinCache.from_cache, or clone() them first"
            )
        with torch._C.DisableTorchFunctionSubclass():
            given = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, ReadOnlyTensor)]
            result = func(*args, **kwargs)
            storages = {each.untyped_storage().data_ptr() for each in given}
            return pytree.tree_map_only(Tensor, lambda made: _marked(made, storages), result)


def read_only(states: Tensor) -> Tensor:
    """The same tensor, read-only."""
    return states.as_subclass(ReadOnlyTensor)  # type: ignore[return-value, unused-ignore]


def _marked(made: Tensor, storages: set[int]) -> Tensor:
    """A result: read-only if it is a view, else an ordinary tensor."""
    is_view = made.numel() > 0 and made.untyped_storage().data_ptr() in storages
    return made.as_subclass(ReadOnlyTensor if is_view else Tensor)
