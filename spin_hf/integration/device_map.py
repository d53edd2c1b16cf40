"""Where a model's weights and layers are, if accelerate has placed them by a `device_map`.

    model.forward = hook ──> inputs to the first device
    └── layers[0].forward = hook ──> inputs to cuda:0   cuda:0 computes
        layers[1].forward = hook ──> inputs to cuda:1   cuda:1 computes
    <── outputs to the device of the inputs (`io_same_device`)

A hook replaces the forward of a module instance and is kept in its `_hf_hook`. One that only moves inputs and outputs between
GPUs does the same at every call, so a CUDA graph can hold its copies. One that loads weights cannot be captured.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from .modules import modules_of

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
_MOVES_STATES = "AlignDevicesHook"
"""accelerate's hook that moves inputs and outputs, and weights if its `offload` is set."""


def layer_devices(model: Any, count: int) -> list[torch.device]:
    """Device of each of the first `count` decoder layers, which may differ. Without a model: the default device."""
    if model is None:
        return [torch.get_default_device()] * count
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    decoder = model if decoder is None else decoder
    only = _only_device(decoder)
    if only is not None:
        return [only] * count
    found: dict[int, torch.device] = {}
    first: torch.device | None = None
    for name, module in decoder.named_modules():
        match = _LAYER.search(f"{name}.")
        if match is None or int(match[1]) in found:
            continue
        executed = _execution_device(module)
        if executed is not None:
            found[int(match[1])] = executed
    for name, parameter in decoder.named_parameters():
        if parameter.is_meta:
            continue
        match, first = _LAYER.search(name), first or parameter.device
        if match is not None:
            found.setdefault(int(match[1]), parameter.device)
    rest = first if first is not None else next(_execution_devices(model), torch.get_default_device())
    return [found.get(index, rest) for index in range(count)]


def _only_device(model: nn.Module) -> torch.device | None:
    """The device of all parameters; None if there are several or none, or accelerate has placed modules."""
    modules = modules_of(model)
    if any("_hf_hook" in module.__dict__ for module in modules):
        return None
    parameters = [each for module in modules for each in module._parameters.values() if each is not None]
    placed = {parameter.device for parameter in parameters if not parameter.is_meta}
    return placed.pop() if len(placed) == 1 else None


def gpus_of(model: nn.Module) -> list[torch.device]:
    """The GPUs that a forward of the model computes on, without duplicates."""
    return [device for device in dict.fromkeys(_devices_of(model)) if device.type == "cuda"]


def uses_a_gpu(model: nn.Module) -> bool:
    """Whether `gpus_of` finds any. Looks at the first weight only, if that is on a GPU: a model has hundreds."""
    first = next(model.parameters(), None)
    if first is not None and first.device.type == "cuda":
        return True
    modules = modules_of(model)
    tensors = [each for module in modules for each in (*module._parameters.values(), *module._buffers.values())]
    found = {tensor.device for tensor in tensors if tensor is not None}
    placed = [_execution_device(module) for module in modules if "_hf_hook" in module.__dict__]
    return any(device is not None and device.type == "cuda" for device in (*found, *placed))


def _devices_of(model: nn.Module) -> Iterator[torch.device]:
    tensors = (tensor.device for tensor in chain(model.parameters(), model.buffers()))
    return chain(tensors, _execution_devices(model))


def other_hooks(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Accelerate's hooks that do more than move inputs and outputs, with the names of their modules."""
    for name, module in model.named_modules():
        for hook in _hooks_of(module):
            if not is_mover(hook) or hook.offload:
                yield name or type(module).__name__, hook


def is_mover(hook: Any) -> bool:
    """Whether a hook moves inputs and outputs, and, if its `offload` is set, weights."""
    return _MOVES_STATES in {kind.__name__ for kind in type(hook).__mro__}


def placements(modules: Sequence[nn.Module]) -> list[tuple[Any, ...]]:
    """What accelerate's hooks do, to be compared with later."""
    return [
        (hook, getattr(hook, "execution_device", None), getattr(hook, "io_same_device", None), getattr(hook, "offload", None))
        for module in modules
        for hook in _hooks_of(module)
    ]  # fmt: skip


def is_placed(module: nn.Module) -> bool:
    """Whether accelerate has replaced the forward of a module."""
    return "_hf_hook" in module.__dict__


def _hooks_of(module: nn.Module) -> tuple[Any, ...]:
    hook = module.__dict__.get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def _execution_devices(model: nn.Module) -> Iterator[torch.device]:
    for module in model.modules():
        device = _execution_device(module)
        if device is not None:
            yield device


def _execution_device(module: nn.Module) -> torch.device | None:
    """Where a hook lets a module compute; None if that is not set."""
    for hook in _hooks_of(module):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else _numbered(torch.device(device))
    return None


def _numbered(device: torch.device) -> torch.device:
    """The device as tensors name it: "cuda" is the current GPU."""
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device
