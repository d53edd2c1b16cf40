"""Allocation outside of inference mode.

Tensors made under `torch.inference_mode()` must not be written to outside of it. Later calls write to a cache's tensors in any
mode, so the cache allocates them with inference mode off.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def outside_inference_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` with inference mode off and without gradients, so that it makes ordinary tensors.

    `function` may read and store the caller's tensors, and must not write to them.
    """

    @functools.wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return outside
