"""Tensors that outlive the mode they are made in.

Under `torch.inference_mode()` torch makes tensors that must not be written to outside of it. What a cache keeps is written to
by later calls, in whatever mode those are, so it is made outside of inference mode.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def outside_inference_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Let the tensors that `function` makes be ordinary ones, without gradients, if inference mode is on.

    Tensors of the caller's that it is given may be read and kept, and not be written to.
    """

    @functools.wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return outside
