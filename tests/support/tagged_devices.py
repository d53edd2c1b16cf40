"""Two devices on a CPU that are told apart: tensors remember theirs, and operations on tensors of both fail.

    FIRST, SECOND    "cpu:1" and "cpu:2": stand for two GPUs
    HOST             "cpu"

torch takes all three for the CPU, so a mode adds what two GPUs would: `tensor.device` is the device that the tensor was made
for or moved to, and an operation on tensors of FIRST and SECOND raises MixedDevicesError. Tensors of the host go with both, as
tests on one GPU find those that do not. Of a Triton kernel that is interpreted only the arguments are checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from spin_hf.storage.chunked_array import ChunkedArray

HOST, FIRST, SECOND = torch.device("cpu"), torch.device("cpu", 1), torch.device("cpu", 2)
_MOVES = {"copy_", "set_", "set_data", "__deepcopy__"}
_DEVICE = Tensor.device.__get__  # type: ignore[attr-defined]
_TO_HOST = {"cpu", "numpy", "tolist", "item"}


class MixedDevicesError(RuntimeError):
    """An operation on tensors of two devices."""


def put(thing: Any, device: torch.device) -> Any:
    """Let a tensor, or all parameters and buffers of a module, be on a device."""
    for tensor in [thing] if isinstance(thing, Tensor) else [*thing.parameters(), *thing.buffers()]:
        tensor._tagged_device = device
    return thing


def device_of(tensor: Tensor) -> torch.device:
    """Where a tensor is."""
    return tensor.__dict__.get("_tagged_device", HOST)


class _Devices(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", str(func))
        if func is _DEVICE or (name == "__get__" and getattr(func, "__self__", None) is Tensor.device):
            return device_of(args[0])
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        given = kwargs.get("device")
        if name == "to":
            given = next((leaf for leaf in (*args[1:], given) if isinstance(leaf, (str, torch.device))), None)
            given = device_of(args[1]) if len(args) > 1 and isinstance(args[1], Tensor) else given
        elif name in _TO_HOST:
            given = HOST
        elif name not in _MOVES:
            self._check(name, tensors)
        device = torch.device(given) if given is not None else self._common(tensors[:1] if name in _MOVES else tensors)
        result = func(*args, **kwargs)
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                leaf._tagged_device = device  # type: ignore[attr-defined]
        return result

    @staticmethod
    def _common(tensors: list[Tensor]) -> torch.device:
        devices = [device_of(tensor) for tensor in tensors]
        return next((device for device in devices if device != HOST), HOST)

    @staticmethod
    def _check(name: str, tensors: list[Tensor]) -> None:
        if {FIRST, SECOND} <= {device_of(tensor) for tensor in tensors}:
            raise MixedDevicesError(f"{name} of tensors on two devices")


@contextmanager
def devices_are_told_apart() -> Iterator[None]:
    """Within this context tensors remember their device."""
    allocate = ChunkedArray._allocate

    def placed(array: ChunkedArray, count: int, device: torch.device, *args: Any) -> list[Tensor]:
        return [put(slab, device) for slab in allocate(array, count, device, *args)]  # memory-mapped on a CPU

    with patch.object(ChunkedArray, "_allocate", placed), _kernels_are_checked(), _Devices():
        yield


@contextmanager
def _kernels_are_checked() -> Iterator[None]:
    """Check the tensors of each launch of an interpreted kernel, and leave the interpreter alone."""
    if find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    launch = interpreter.GridExecutor.__call__

    def checked(executor: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        _Devices._check(executor.fn.__name__, tensors)
        with torch._C.DisableTorchFunction():
            return launch(executor, *args, **kwargs)

    with patch.object(interpreter.GridExecutor, "__call__", checked):
        yield
