"""Whether a model's decode step can be a CUDA graph, and whether a captured one still describes the model.

    reason_not_captured    the model and its cache layers, looked at once
    reason_not_replayed    the arguments and settings of one call
    fixed_arguments        what a captured call gets in place of its attention mask
    ModelGuard             parameters, buffers, modules, hooks and adapters, compared with every replay
      is_safe                before it: the addresses that it will read
      unchanged              everything; before it, or behind it where a wrong replay can be taken back

A graph replays launches by address and runs no Python: whatever would change what the Python does must be seen here.
"""

from __future__ import annotations

import operator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules import module as everywhere
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

from ..integration.layer_types import is_placeholder
from ..layer import SpinLayer
from ..state import CacheState

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def reason_not_captured(model: nn.Module, layers: list[Any], state: CacheState) -> str | None:
    """Why decode steps of `model` with a cache of these layers run eagerly; None if nothing is known against capturing."""
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
    for layer in layers:
        if isinstance(layer, SpinLayer):
            if not layer.has_kernels:
                return f"method {state.method} has no kernels for its layers"
        elif type(layer) not in (DynamicSlidingWindowLayer, LinearAttentionLayer) and not is_placeholder(layer):
            return f"a {type(layer).__name__} of its cache grows with every token"
    return None


def _foreign(hook: Any) -> bool:
    """Not one of transformers' own, which collect outputs and do so while capturing."""
    return not str(getattr(hook, "__module__", "")).startswith("transformers.")


def reason_not_replayed(watch: ModelGuard, unpaged: list[Any], kwargs: dict[str, Any], cache_name: str) -> str | None:
    """Why a call that could else be captured runs eagerly; cheap, and asked at every call.

    Args:
        watch: over the model that is called.
        unpaged: layers of the cache whose tensors a step overwrites.
        kwargs: of the forward, the cache under `cache_name`.
    """
    mask = kwargs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        return "its attention mask is more than padding"
    if _sizes_a_mask(watch.modules[0]) and kwargs.get("position_ids") is None:
        return "OPT counts positions in a mask of the context's length; pass position_ids"
    if any(getattr(layer, "record_past", False) for layer in unpaged):
        return "its window or linear-attention layers record the past"
    if watch.modules[0].training:
        return "the model is in training mode; call model.eval()"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in watch.tensors):
        return "gradients are recorded; call it under torch.no_grad()"
    if kwargs.get("output_attentions") or getattr(watch.modules[0].config, "output_attentions", False):
        return "it returns attention weights, which the reference path makes"
    if torch.is_autocast_enabled("cuda"):
        return "autocast is on; convert the model to the dtype instead"
    for name, given in kwargs.items():
        if not isinstance(given, (Tensor, bool, int, float, str, type(None))) and name != cache_name:
            return f"its argument {name} is a {type(given).__name__}"
    return None


def fixed_arguments(model: nn.Module | None, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What a captured call of `model` gets beside `inputs`, the same at every replay.

    The cache takes the padding before the step, so captured calls have no mask. OPT then makes one of the context's length,
    which is on the device while a graph is captured, so that it would wait for it. With position ids it does not look at it:
    a mask of the one new token spares it that.
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
    """What a captured step of `model` relies on."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self.training, self.forwards = _training(modules), _forwards(modules)
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

    def is_safe(self) -> bool:
        """Whether a replay reads no memory that is gone, and no hook was made since the last look. Takes little time.

        Tensors that a module no longer has are kept alive by this watch, so what a graph reads of them stays where it was.
        Those that it still has lose their memory in one way only, another one put under the same tensor (`model.to`, `.data`);
        that shows in their address. A sample of addresses would do for `model.to`, and miss weights merged one by one.
        """
        return self.handles == RemovableHandle.next_id and self._in_place()

    def unchanged(self) -> bool:
        """Whether the model is still what it was, seen from the host without looking at the device."""
        if self.hooks or self.handles != RemovableHandle.next_id:  # handles are counted when made, and not when removed
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


def _hooks(modules: list[nn.Module]) -> list[int]:
    own = (getattr(module, kind) for module in modules for kind in _HOOKS)
    of_all = (getattr(everywhere, f"_global{kind}") for kind in _HOOKS)
    return [id(hook) for table in chain(own, of_all) for hook in table.values()]


def _forwards(modules: list[nn.Module]) -> list[Any]:
    """What was set on instances instead of their class's forward, as accelerate does."""
    return [module.__dict__.get("forward") for module in modules]


def _training(modules: list[nn.Module]) -> list[bool]:
    return [module.training for module in modules]


def _adapters(modules: list[Any]) -> list[Any]:
    """State of PEFT's layers: which adapters apply, merged or not, and how strongly."""
    return [
        (module._disable_adapters, module.active_adapters, list(module.merged_adapters), dict(getattr(module, "scaling", {})))
        for module in modules
    ]  # fmt: skip


def host_state() -> tuple[Any, ...]:
    """What of the calling thread's torch settings decides which launches a forward makes."""
    return torch._C._len_torch_dispatch_stack(), torch.get_float32_matmul_precision()
