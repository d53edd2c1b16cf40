"""The current device of a launch. Triton launches on the current device, wherever the tensors are.

    one GPU        nothing to do
    several GPUs   the device of the tensors is current during the launch

torch's own operations switch devices themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_NOTHING: AbstractContextManager[Any] = nullcontext()


@lru_cache(None)
def several_gpus() -> bool:
    """Whether this process sees more than one GPU."""
    return torch.cuda.device_count() > 1


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which the GPU that holds `tensor` is current."""
    return torch.cuda.device_of(tensor) if several_gpus() else _NOTHING


def on_device_of_arguments(args: Iterable[Any]) -> AbstractContextManager[Any]:
    """As `on_device_of`, for the first tensor among the arguments of a launch. All tensors of a launch are on one device."""
    if not several_gpus():
        return _NOTHING
    tensor = next((arg for arg in args if isinstance(arg, Tensor)), None)
    return _NOTHING if tensor is None else torch.cuda.device_of(tensor)
