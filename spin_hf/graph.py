"""The captured decode step: `model.forward` of one new token a sequence, replayed as a CUDA graph.

    first call of a shape     eager; compiles kernels, allocates what is allocated once
    second                    captured, then replayed
    later ones                host: room for the token, descriptors, inputs  ->  replay  ->  host: the token counts

What a call needs of the host happens before the replay (`SharedState.prepare`) and after it (`commit`); between them the
layers only launch. Inputs are copied into static tensors, outputs are handed back as copies. Tensors of layers that are not
paged (windows, linear attention) get fixed addresses: what the step makes of them is written back as its last launches.

While capturing, `get_seq_length` gives a tensor on the device instead of a number, so positions that a model derives from
it are right in every replay; a model that asks the host for it, or for anything else, cannot be captured and runs eagerly,
with one warning that says why.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

from .attention.interface import padding_mask_of
from .capturable import ModelWatch, host_state, reason_not_captured
from .forward import ForwardLog
from .shared import SharedState

logger = logging.getLogger("spin_hf")

_MAX_SHAPES = 8
"""Captured calls of a cache that differ in shape or mode; beyond that the oldest goes."""

_warned: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()
_CACHE = object()
"""Stands for the cache in what a graph keeps, so that the graph does not keep the cache alive."""


class Recorder:
    """Records launches in a CUDA graph."""

    def __init__(self) -> None:
        self.graph = torch.cuda.CUDAGraph()

    def record(self, step: Callable[[], Any]) -> Any:
        """Capture `step`; returns its result, whose tensors are filled by `replay`."""
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            return step()

    def replay(self) -> None:
        """Launch what was captured, on the current stream."""
        self.graph.replay()


class FixedState:
    """Tensors of the unpaged layers, at addresses that stay.

    Args:
        layers: the cache's layers.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.windows = _windows(layers)
        self.places = [
            place
            for layer in layers
            if isinstance(layer, (DynamicSlidingWindowLayer, LinearAttentionLayer))
            for place in _places(layer)
        ]
        self.tensors = [table[name].clone(memory_format=torch.contiguous_format) for table, name in self.places]

    def bind(self) -> None:
        """Before a step: what the layers hold now, at the fixed addresses."""
        for (table, name), tensor in zip(self.places, self.tensors, strict=True):
            if table[name] is not tensor:
                tensor.copy_(table[name])
                table[name] = tensor

    def advance(self, length: int) -> None:
        """After a step: windows count their tokens on the host."""
        for layer in self.windows:
            layer.cumulative_length = length


def _windows(layers: list[Any]) -> list[Any]:
    return [layer for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]


def _places(layer: Any) -> list[tuple[dict[Any, Any], Any]]:
    if isinstance(layer, DynamicSlidingWindowLayer):
        return [(layer.__dict__, "keys"), (layer.__dict__, "values")]
    return [
        (table, index)
        for table in (layer.conv_states, layer.recurrent_states)
        for index, tensor in table.items()
        if tensor is not None
    ]


class CapturedStep:
    """One captured call of a forward."""

    def __init__(self, inputs: dict[str, Any], layers: list[Any]) -> None:
        self.inputs = {name: given.clone() if isinstance(given, Tensor) else given for name, given in inputs.items()}
        self.state = FixedState(layers)
        self.recorder = Recorder()
        self.outputs: list[Any] = []
        self.form: Any = None

    def capture(self, forward: Callable[..., Any], cache: dict[str, Any], shared: SharedState) -> None:
        """Record the call, with the cache under its name; nothing is computed yet."""

        def step() -> Any:
            with shared.capturing():
                outputs = forward(**self.inputs, **cache)
            self.state.bind()
            return outputs

        self.state.bind()
        outputs = self.recorder.record(step)
        leaves, self.form = pytree.tree_flatten(outputs)
        (held,) = cache.values()
        self.outputs = [_CACHE if leaf is held else leaf for leaf in leaves]

    def replay(self, inputs: dict[str, Any], cache: Any) -> Any:
        """Run the step with other contents of `inputs`; returns copies of its outputs."""
        for name, static in self.inputs.items():
            if isinstance(static, Tensor):
                static.copy_(inputs[name], non_blocking=True)
        self.state.bind()
        self.recorder.replay()
        leaves = [
            leaf.clone() if isinstance(leaf, Tensor) else cache if leaf is _CACHE else leaf for leaf in self.outputs
        ]
        return pytree.tree_unflatten(leaves, self.form)


def graph_model(model: Any) -> nn.Module | None:
    """The module whose forward `generate` calls, if its decode steps may become CUDA graphs; None for a config."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's wrapper generates with it
    if not isinstance(model, PreTrainedModel) or model.device.type != "cuda":
        return None
    return model


class DecodeSteps:
    """The decode steps of one cache on one model.

    Args:
        model: whose forward is wrapped; kept alive once a step has run, as a graph reads its parameters.
        layers, shared, log: of the cache.
    """

    def __init__(self, model: nn.Module, layers: list[Any], shared: SharedState, log: ForwardLog) -> None:
        self.model = weakref.ref(model)
        self.layers, self.shared, self.log = layers, shared, log
        self.captured: dict[Any, CapturedStep | None] = {}
        """Key of a call -> its graph; None where it ran once, eagerly."""
        self.watch: ModelWatch | None = None
        self.kernels: list[Any] = []
        self.held: list[Any] = []
        """The layers captured; `reset` replaces those that are not paged."""
        self.refused: str | None = None
        self.running = False
        """Whether a call is in progress: somebody wrapped a wrapped forward, and the outer wrap has it."""

    def run(self, model: nn.Module, forward: Callable[..., Any], kwargs: dict[str, Any], name: str) -> Any:
        """Call `forward(**kwargs)`, as a replay where that gives the same; the cache is `kwargs[name]`.

        Raises:
            what the forward raises; BudgetError, CapacityError, BatchSizeError before any work.
        """
        if self.running or model is not self.model() or not self._is_decode_step(kwargs):
            return forward(**kwargs)
        self.running = True
        try:
            return self._run(model, forward, kwargs, name)
        finally:
            self.running = False

    def _run(self, model: nn.Module, forward: Callable[..., Any], kwargs: dict[str, Any], name: str) -> Any:
        self._look_at(model)
        reason = self.refused or self._reason_this_call(model, kwargs, name)
        if reason is not None:
            _warn(model, reason)
            return forward(**kwargs)
        inputs = {key: given for key, given in kwargs.items() if key not in ("attention_mask", name)}
        self.log.settle(self.layers)
        new_valid = self.shared.take_padding(padding_mask_of(kwargs.get("attention_mask"), self.shared.committed + 1))
        if not self._windows_are_full(new_valid):
            return forward(**kwargs)
        key = self._key(inputs)
        if key not in self.captured:
            while len(self.captured) >= _MAX_SHAPES:
                del self.captured[next(iter(self.captured))]
            self.captured[key] = None
            return forward(**kwargs)
        step = self.captured[key]
        self.shared.prepare(self.shared.sequences.batch_size, 1, new_valid)
        if step is None:
            try:
                step = self._capture(forward, inputs, {name: kwargs[name]})
            except Exception as error:
                self._take_back()
                self.refused = f"capturing failed: {str(error).strip().splitlines()[0] if str(error) else repr(error)}"
                _warn(model, self.refused)
                return forward(**kwargs)
            except BaseException:
                self._take_back()
                raise
            self.captured[key] = step
        try:
            outputs = step.replay(inputs, kwargs[name])
        except BaseException:
            self._take_back()
            raise
        self.log.clear()
        self.shared.finish()
        step.state.advance(self.shared.committed)
        return outputs

    def _capture(self, forward: Callable[..., Any], inputs: dict[str, Any], cache: dict[str, Any]) -> CapturedStep:
        with torch.inference_mode(False), torch.no_grad():  # static tensors outlive an inference mode
            step = CapturedStep(inputs, self.layers)
            windows = _windows(self.layers)
            before = [dict(layer.__dict__) for layer in windows]
            try:
                step.capture(forward, cache, self.shared)
            except BaseException:
                for layer, attributes in zip(windows, before, strict=True):
                    layer.__dict__.update(attributes)
                raise
        return step

    def _is_decode_step(self, kwargs: dict[str, Any]) -> bool:
        new = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        shape = (self.shared.sequences.batch_size, 1)
        return isinstance(new, Tensor) and tuple(new.shape[:2]) == shape and self.shared.committed > 0

    def _look_at(self, model: nn.Module) -> None:
        """Start anew where the model, the layers or the kernels are others than those captured."""
        kernels = self.shared.kernels_in_use()
        same = kernels == self.kernels and self.layers == self.held
        if self.watch is None or not same or not self.watch.unchanged():
            self.captured.clear()
            self.watch, self.kernels, self.held = ModelWatch(model), kernels, list(self.layers)
            self.refused = reason_not_captured(model, self.layers, self.shared)

    def _reason_this_call(self, model: nn.Module, kwargs: dict[str, Any], cache_name: str) -> str | None:
        """Why a call that could else be captured runs eagerly."""
        mask = kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            return "its attention mask is more than padding"
        if any(getattr(layer, "record_past", False) for layer in self.layers):
            return "its window or linear-attention layers record the past"
        if model.training:
            return "the model is in training mode; call model.eval()"
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters()):
            return "gradients are recorded; call it under torch.no_grad()"
        if torch.is_autocast_enabled("cuda"):
            return "autocast is on; convert the model to the dtype instead"
        for name, given in kwargs.items():
            if not isinstance(given, (Tensor, bool, int, float, str, type(None))) and name != cache_name:
                return f"its argument {name} is a {type(given).__name__}"
        return None

    def _key(self, inputs: dict[str, Any]) -> Any:
        padded = self.shared.sequences.mask.valid is not None
        given = tuple(
            (name, (tuple(value.shape), value.dtype, value.device) if isinstance(value, Tensor) else value)
            for name, value in inputs.items()
        )
        return given, padded, host_state()

    def _windows_are_full(self, new_valid: Tensor | None) -> bool:
        """Whether every window is full and free of padding: until then it grows, or needs a mask."""
        windows = _windows(self.layers)
        if any(layer.cumulative_length < layer.sliding_window for layer in windows):
            return False
        valid = self.shared.sequences.mask.valid
        if not windows or (valid is None and new_valid is None):
            return True
        widest = max(layer.sliding_window for layer in windows)
        return (valid is None or bool(valid[:, -widest:].all())) and (new_valid is None or bool(new_valid.all()))

    def _take_back(self) -> None:
        """After a capture that failed: nothing was computed, so nothing but the host's count has changed."""
        self.log.clear()
        self.shared.roll_back()


def _warn(model: nn.Module, reason: str) -> None:
    said = _warned.setdefault(model, set())
    if reason not in said:
        said.add(reason)
        logger.warning("%s decodes eagerly, not as a CUDA graph: %s", type(model).__name__, reason)
