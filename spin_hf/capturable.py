"""Whether a model's decode step can be a CUDA graph, and whether a captured one still describes the model.

    reason_not_captured    the model and its cache layers, looked at once
    ModelWatch             parameters, buffers, modules, hooks and adapters, compared before every replay

A graph replays launches by address and runs no Python: whatever would change what the Python does must be seen here.
"""

from __future__ import annotations

import operator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

from .layer import SpinLayer
from .layer_kinds import is_placeholder
from .shared import SharedState

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def reason_not_captured(model: nn.Module, layers: list[Any], shared: SharedState) -> str | None:
    """Why decode steps of `model` with a cache of these layers run eagerly; None if nothing is known against capturing."""
    devices = {str(tensor.device) for tensor in chain(model.parameters(), model.buffers())}
    if len(devices) > 1:
        return f"its parameters are on several devices ({', '.join(sorted(devices))})"
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return "its parameters are distributed"
    for name, module in model.named_modules():
        if module is not model and any(_foreign(hook) for kind in _HOOKS for hook in getattr(module, kind).values()):
            return f"a forward hook on {name} would not be called in a replay"
    if "chunked_attention" in (getattr(model.config, "layer_types", None) or ()):
        return "chunked attention starts a new chunk at certain positions"
    for layer in layers:
        if isinstance(layer, SpinLayer):
            if not layer.has_kernels:
                return f"method {shared.method} has no kernels for its layers"
        elif type(layer) not in (DynamicSlidingWindowLayer, LinearAttentionLayer) and not is_placeholder(layer):
            return f"a {type(layer).__name__} of its cache grows with every token"
    return None


def _foreign(hook: Any) -> bool:
    """Not one of transformers' own, which collect outputs and do so while capturing."""
    return not str(getattr(hook, "__module__", "")).startswith("transformers.")


class ModelWatch:
    """What a captured step of `model` relies on."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self.model, self.training = model, model.training
        self.handles = RemovableHandle.next_id
        self.hooks = _hooks(modules)
        self.modules = modules
        self.dicts: list[dict[str, Any]] = [
            table for m in modules for table in (m._parameters, m._buffers, m._modules) if table
        ]  # fmt: skip
        self.members = self._members()
        self.tensors = [member for member in self.members if isinstance(member, Tensor)]
        self.addresses = list(map(Tensor.data_ptr, self.tensors))
        self.adapted = [module for module in modules if hasattr(module, "_disable_adapters")]
        self.adapters = _adapters(self.adapted)

    def unchanged(self) -> bool:
        """Whether the model is still what it was, seen from the host without looking at the device."""
        if self.handles != RemovableHandle.next_id:
            if self.hooks != _hooks(self.modules):
                return False
            self.handles = RemovableHandle.next_id
        members = self._members()
        return (
            self.training == self.model.training
            and len(members) == len(self.members)
            and all(map(operator.is_, members, self.members))
            and self.addresses == list(map(Tensor.data_ptr, self.tensors))
            and (not self.adapted or self.adapters == _adapters(self.adapted))
        )

    def _members(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self.dicts)))


def _hooks(modules: list[nn.Module]) -> list[int]:
    return [id(hook) for module in modules for kind in _HOOKS for hook in getattr(module, kind).values()]


def _adapters(modules: list[Any]) -> list[Any]:
    """State of PEFT's layers: which adapters apply, merged or not, and how strongly."""
    return [
        (module._disable_adapters, module.active_adapters, list(module.merged_adapters), dict(getattr(module, "scaling", {})))
        for module in modules
    ]  # fmt: skip


def host_state() -> tuple[Any, ...]:
    """What of the calling thread's torch settings decides which launches a forward makes."""
    return torch._C._len_torch_dispatch_stack(), torch.get_float32_matmul_precision()
