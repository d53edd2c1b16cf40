"""Whether a decode step can be captured as a CUDA graph, and whether a captured graph is still valid for the model.

    reason_not_captured    model and cache layers; checked once
    reason_not_replayed    arguments and settings of one call
    fixed_arguments        arguments of a captured call in place of its attention mask
    ModelGuard             parameters, buffers, modules, hooks and adapters; compared at every replay
      is_safe                before the replay: addresses that it will read
      unchanged              everything: before the replay, or after it if a wrong replay can be rolled back
    ModelRecord            the same for graphs that outlive their cache

A graph replays launches with fixed addresses and runs no Python. These checks must detect any change that would make the
Python code do something else.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from itertools import chain
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules import module as everywhere
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

from ..integration.forward_hook import without_wrapper
from ..integration.layer_types import is_placeholder
from ..layer import SpinLayer
from ..state import CacheState

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def reason_not_captured(model: nn.Module, layers: list[Any], state: CacheState) -> str | None:
    """Why decode steps of `model` with these cache layers cannot be captured; None if nothing is known against it."""
    reason = reason_of_model(model)
    if reason is not None:
        return reason
    for layer in layers:
        if isinstance(layer, SpinLayer):
            if not layer.backend.capturable:
                return f"method {state.method} has no kernels for its layers"
        elif type(layer) not in (DynamicSlidingWindowLayer, LinearAttentionLayer) and not is_placeholder(layer):
            return f"a {type(layer).__name__} of its cache grows with every token"
    return None


def reason_of_model(model: nn.Module) -> str | None:
    """Why decode steps of `model` cannot be captured, whatever its cache; None if nothing is known against it."""
    devices = {str(tensor.device) for tensor in chain(model.parameters(), model.buffers())}
    if len(devices) > 1:
        return f"its parameters are on several devices ({', '.join(sorted(devices))})"
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return "its parameters are distributed"
    if any(getattr(everywhere, f"_global{kind}") for kind in _HOOKS):
        return "a forward hook on all modules would not be called in a replay"
    for name, module in model.named_modules():
        if module is not model and any(_foreign(hook) for kind in _HOOKS for hook in getattr(module, kind).values()):
            return f"a forward hook on {name} would not be called in a replay"
    if "chunked_attention" in (getattr(model.config, "layer_types", None) or ()):
        return "chunked attention starts a new chunk at certain positions"
    return None


def _foreign(hook: Any) -> bool:
    """Whether a hook is not from transformers. transformers' hooks collect outputs, which works during capture."""
    return not str(getattr(hook, "__module__", "")).startswith("transformers.")


def reason_not_replayed(watch: ModelGuard, unpaged: list[Any], kwargs: dict[str, Any], cache_name: str) -> str | None:
    """Why a call of a capturable model runs eagerly; None if it need not. Cheap: it runs at every call.

    Args:
        watch: guard of the model.
        unpaged: cache layers with tensors that a step overwrites.
        kwargs: arguments of the forward, with the cache under `cache_name`.
    """
    mask = kwargs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        return "its attention mask is more than padding"
    if _sizes_a_mask(watch.model) and kwargs.get("position_ids") is None:
        return "OPT counts positions in a mask of the context's length; pass position_ids"
    if any(getattr(layer, "record_past", False) for layer in unpaged):
        return "its window or linear-attention layers record the past"
    if watch.model.training:
        return "the model is in training mode; call model.eval()"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in watch.tensors):
        return "gradients are recorded; call it under torch.no_grad()"
    if kwargs.get("output_attentions") or getattr(watch.model.config, "output_attentions", False):
        return "it returns attention weights, which the reference path makes"
    if torch.is_autocast_enabled("cuda"):
        return "autocast is on; convert the model to the dtype instead"
    for name, given in kwargs.items():
        if not isinstance(given, (Tensor, bool, int, float, str, type(None))) and name != cache_name:
            return f"its argument {name} is a {type(given).__name__}"
    return None


def fixed_arguments(model: nn.Module | None, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Arguments of a captured call of `model` in addition to `inputs`, the same at every replay.

    The cache records padding before the step, so captured calls have no mask. Without one, OPT builds a mask of the context's
    length, which would read that length from the device during capture. Given position ids OPT does not use the mask's
    content, so a mask of the one new token avoids this.
    """
    if model is None or not _sizes_a_mask(model):
        return {}
    ids = inputs["position_ids"]
    return {"attention_mask": torch.ones_like(ids[:, -1:]).expand(_batch_of(inputs), 1)}


def _sizes_a_mask(model: nn.Module) -> bool:
    return getattr(getattr(model, "config", None), "model_type", None) == "opt"


def _batch_of(inputs: dict[str, Any]) -> int:
    ids = inputs.get("input_ids")
    return int((inputs["inputs_embeds"] if ids is None else ids).shape[0])


class ModelGuard:
    """Records what a captured step of `model` depends on, and detects changes."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self.training, self.forwards = _training(modules), _forwards(modules)
        self.handles = RemovableHandle.next_id
        self.hooks = _hooks(modules)
        self.modules = modules
        self.dicts: list[dict[str, Any]] = [
            table for m in modules for table in (m._parameters, m._buffers, m._modules) if table
        ]
        self.members = self._members()
        self.tensors = [member for member in self.members if isinstance(member, Tensor)]
        self.addresses = list(map(Tensor.data_ptr, self.tensors))
        self.adapted = [module for module in modules if hasattr(module, "_disable_adapters")]
        self.adapters = _adapters(self.adapted)

    @property
    def model(self) -> Any:
        """The model."""
        return self.modules[0]

    def is_safe(self) -> bool:
        """Whether a replay reads valid memory and no hook was registered since the last check. Cheap.

        The guard keeps the model's tensors alive, so a graph may read tensors that a module no longer has. A live tensor
        loses its memory only if its storage is replaced (`model.to`, `.data`), which changes its address. All addresses are
        compared: a sample would detect `model.to`, but not weights that are merged one by one.
        """
        return self.handles == RemovableHandle.next_id and self._in_place()

    def unchanged(self) -> bool:
        """Whether the model is as it was at capture. Compares on the host and does not read the device."""
        if self.hooks or self.handles != RemovableHandle.next_id:  # ids count registered hooks, not removed ones
            if self.hooks != _hooks(self.modules):
                return False
            self.handles = RemovableHandle.next_id
        members = self._members()
        return (
            self.training == _training(self.modules)
            and self.forwards == _forwards(self.modules)
            and len(members) == len(self.members)
            and all(map(operator.is_, members, self.members))
            and self._in_place()
            and (not self.adapted or self.adapters == _adapters(self.adapted))
        )

    def _in_place(self) -> bool:
        return self.addresses == list(map(Tensor.data_ptr, self.tensors))

    def _members(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self.dicts)))


class ModelRecord:
    """What graphs were captured under, for caches that come later. Keeps no module and no tensor alive.

    Args:
        guard: of the model as it is.
    """

    def __init__(self, guard: ModelGuard) -> None:
        self._objects = [_reference(each) for each in _objects(guard)]
        self._settings = _settings(guard)

    def describes(self, guard: ModelGuard) -> bool:
        """Whether the model of a guard is as it was."""
        objects = _objects(guard)
        return (
            len(objects) == len(self._objects)
            and all(_same(reference(), each) for reference, each in zip(self._objects, objects, strict=True))
            and self._settings == _settings(guard)
        )


def _objects(guard: ModelGuard) -> list[Any]:
    """Modules, their members, and forwards."""
    return [*guard.modules, *guard.members, *guard.forwards]


def _reference(thing: Any) -> Callable[[], Any]:
    """A function that returns an object while it lives, else None; a new one for a bound method."""
    if thing is None:
        return lambda: None
    return weakref.WeakMethod(thing) if isinstance(thing, MethodType) else weakref.ref(thing)


def _same(one: Any, other: Any) -> bool:
    """Whether two objects are the same. Bound methods are made anew each time."""
    return one is other or (isinstance(one, MethodType) and bool(one == other))


def _settings(guard: ModelGuard) -> tuple[Any, ...]:
    return guard.training, guard.hooks, guard.addresses, guard.adapters


def _hooks(modules: list[nn.Module]) -> list[int]:
    own = (getattr(module, kind) for module in modules for kind in _HOOKS)
    of_all = (getattr(everywhere, f"_global{kind}") for kind in _HOOKS)
    return [id(hook) for table in chain(own, of_all) for hook in table.values()]


def _forwards(modules: list[nn.Module]) -> list[Any]:
    """Forwards that were set on module instances, as accelerate does, below this package's wrappers; None for the class's."""
    return [without_wrapper(module) for module in modules]


def _training(modules: list[nn.Module]) -> list[bool]:
    return [module.training for module in modules]


def _adapters(modules: list[Any]) -> list[Any]:
    """State of PEFT's layers: active and merged adapters, and their scaling."""
    return [
        (module._disable_adapters, module.active_adapters, list(module.merged_adapters), dict(getattr(module, "scaling", {})))
        for module in modules
    ]  # fmt: skip


def host_state() -> tuple[Any, ...]:
    """Settings of the calling thread that determine which kernels a forward launches."""
    return torch._C._len_torch_dispatch_stack(), torch.get_float32_matmul_precision()
