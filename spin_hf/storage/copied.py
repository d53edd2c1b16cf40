"""Deep copies of objects whose attributes are mostly numbers, dtypes and tables that are replaced, not written to.

`copy.deepcopy` looks at every attribute of every object, and a fork copies some of each layer.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, TypeVar

T = TypeVar("T")


def copied(held: T, memo: dict[int, Any], *names: str) -> T:
    """A copy for `deepcopy`: of `names`, attributes that are written into, there are deep copies; the others are shared.

    Args:
        memo: as for `__deepcopy__`. Gets the copy.
    """
    twin = object.__new__(type(held))
    memo[id(held)] = twin
    attributes = twin.__dict__
    attributes.update(held.__dict__)
    for name in names:
        if attributes[name] is not None:
            attributes[name] = deepcopy(attributes[name], memo)
    return twin
