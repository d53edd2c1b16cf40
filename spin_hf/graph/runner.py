"""The captured decode step: `model.forward` of one new token a sequence, replayed as a CUDA graph.

    first call of a shape     eager; compiles kernels, allocates what is allocated once
    second                    captured, then replayed
    later ones                host: room for the token, descriptors, inputs  ->  replay  ->  host: the token counts

What a call needs of the host happens before the replay (`ForwardPass.prepare`) and after it (`finish`); between them the
layers only launch. Inputs are copied into static tensors, outputs are handed back as copies. Tensors of layers that are not
paged (windows, linear attention) get fixed addresses: what the step makes of them is written back as its last launches.

Until the replay is launched the device has nothing to do. So where all layers are paged the step is launched on trust and
verified behind that (`graph/replay_check.py`); what does not hold is taken back:

    on trust      addresses  ->  replay  ->  model, mask  ->  done, or back to where the step began and
    looking       model, mask  ->  replay, capture or eager forward

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

from ..attention.masks import padding_mask_of
from ..backends.position_check import counts_positions
from ..errors import SpinError
from ..forward_log import ForwardLog
from ..forward_pass import ForwardPass
from ..indexing import padding_change
from ..state import CacheState
from ..storage.host_register import ONE_AT_A_TIME
from ..storage.pinned_slab import give_back_dropped
from .eligibility import ModelGuard, fixed_arguments, host_state, reason_not_captured, reason_not_replayed
from .replay_check import ReplayCheck
from .static_states import StaticStates, overwritten, windows_of

logger = logging.getLogger("spin_hf")

_MAX_SHAPES = 8
"""Captured calls of a cache that differ in shape or mode; beyond that the oldest goes."""

_warned: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()
_CACHE = object()
"""Stands for the cache in what a graph keeps, so that the graph does not keep the cache alive."""
_NOT_REPLAYED = object()
"""Instead of outputs: a step was not replayed on trust, or was and has been taken back."""


class Recorder:
    """Records launches in a CUDA graph."""

    def __init__(self) -> None:
        self.graph = torch.cuda.CUDAGraph()

    def record(self, step: Callable[[], Any]) -> Any:
        """Capture `step`; returns its result, whose tensors are filled by `replay`. Other threads may go on launching."""
        with ONE_AT_A_TIME, torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            result = step()
        give_back_dropped()  # what was dropped meanwhile
        return result

    def replay(self) -> None:
        """Launch what was captured, on the current stream."""
        self.graph.replay()


class CapturedStep:
    """One captured call of a forward."""

    def __init__(self, inputs: dict[str, Any], layers: list[Any]) -> None:
        self.inputs = {name: given.clone() if isinstance(given, Tensor) else given for name, given in inputs.items()}
        self.state = StaticStates(layers)
        self.fixed: dict[str, Any] = {}
        """Arguments that are the same at every replay."""
        self.recorder = Recorder()
        self.outputs: list[Any] = []
        self.form: Any = None
        self.overwrites = False
        """Whether the latest replay has been launched and cannot be done again."""

    def capture(self, forward: Callable[..., Any], cache: dict[str, Any], passes: ForwardPass) -> None:
        """Record the call, with the cache under its name; nothing is computed yet."""

        def step() -> Any:
            with passes.capturing():
                outputs = forward(**self.inputs, **self.fixed, **cache)
            self.state.bind()
            return outputs

        self.state.bind()
        outputs = self.recorder.record(step)
        leaves, self.form = pytree.tree_flatten(outputs)
        (held,) = cache.values()
        self.outputs = [_CACHE if leaf is held else leaf for leaf in leaves]

    def replay(self, inputs: dict[str, Any], cache: Any) -> Any:
        """Run the step with other contents of `inputs`; returns copies of its outputs."""
        self.overwrites, copies = False, None
        for name, static in self.inputs.items():
            if isinstance(static, Tensor):
                static.copy_(inputs[name], non_blocking=True)
        self.state.bind()
        if self.state.tensors:  # once it is launched nothing more should ask for memory
            copies = [torch.empty_like(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self.outputs]
            self.overwrites = True
        self.recorder.replay()
        leaves = [cache if leaf is _CACHE else leaf for leaf in self.outputs]
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                leaves[index] = leaf.clone() if copies is None else copies[index].copy_(leaf)
        return pytree.tree_unflatten(leaves, self.form)


class GraphRunner:
    """The decode steps of one cache on one model.

    Args:
        model: whose forward is wrapped; kept alive once a step has run, as a graph reads its parameters.
        layers, passes, log: of the cache.
    """

    def __init__(self, model: nn.Module, layers: list[Any], passes: ForwardPass, log: ForwardLog) -> None:
        self.model = weakref.ref(model)
        self.layers, self.passes, self.log = layers, passes, log
        self.state: CacheState = passes.state
        self.captured: dict[Any, CapturedStep | None] = {}
        """Key of a call -> its graph; None where it ran once, eagerly."""
        self.watch: ModelGuard | None = None
        self.replay_check = ReplayCheck()
        self.kernels: list[Any] = []
        self.held: list[Any] = []
        """The layers captured; `reset` replaces those that are not paged."""
        self.unpaged: list[Any] = []
        """Those of them whose tensors a step overwrites."""
        self.refused: str | None = None

    def run(self, model: nn.Module, forward: Callable[..., Any], kwargs: dict[str, Any], name: str) -> Any:
        """Call `forward(**kwargs)`, as a replay where that gives the same; the cache is `kwargs[name]`.

        Raises:
            what the forward raises; BudgetError, CapacityError, BatchSizeError before any work.
        """
        if self._is_decode_step(kwargs):
            return self._run(model, forward, kwargs, name)
        return self._eager(forward, kwargs)

    def _eager(self, forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """The forward as it is; where it fails, even behind the last layer, the cache is as before."""
        with self.log.watching(self.layers):
            return forward(**kwargs)

    def _run(self, model: nn.Module, forward: Callable[..., Any], kwargs: dict[str, Any], name: str) -> Any:
        inputs = {key: given for key, given in kwargs.items() if key not in ("attention_mask", name)}
        if self._may_replay_optimistically():
            outputs = self._replay_optimistically(inputs, kwargs, name)
            if outputs is not _NOT_REPLAYED:
                return outputs
        watch = self._look_at(model)
        reason = self.refused or reason_not_replayed(watch, self.unpaged, kwargs, name)
        if reason is not None:
            _warn(model, reason)
            return self._eager(forward, kwargs)
        self.log.settle(self.layers)
        length, batch_size = self.state.committed + 1, self.state.sequences.batch_size
        new_valid = padding_change.take(self.state, padding_mask_of(kwargs.get("attention_mask"), length, batch_size))
        counts = counts_positions(self.state, kwargs.get("position_ids"), new_valid)
        if not counts or not self._windows_are_full(new_valid):
            return self._eager(forward, kwargs)  # which refuses positions that do not count
        key = self._key(inputs, new_valid)
        if key not in self.captured:
            while len(self.captured) >= _MAX_SHAPES:
                del self.captured[next(iter(self.captured))]
            self.captured[key] = None
            return self._eager(forward, kwargs)
        step = self.captured[key]
        try:
            prepared = self._prepare(new_valid)
            if prepared and step is None:
                step = self.captured[key] = self._capture(forward, inputs, {name: kwargs[name]})
        except Exception as error:
            self._roll_back()
            if step is not None or isinstance(error, (SpinError, MemoryError)):
                raise
            reason = f"capturing failed: {str(error).strip().splitlines()[0] if str(error) else repr(error)}"
            if isinstance(error, torch.OutOfMemoryError):
                del self.captured[key]  # the step after the next one is captured if there is memory
            else:
                self.refused = reason
            _warn(model, reason)
            return self._eager(forward, kwargs)
        except BaseException:
            self._roll_back()
            raise
        if step is None or not prepared:
            return self._eager(forward, kwargs)
        return self._replay(step, inputs, kwargs[name])

    def _replay(self, step: CapturedStep, inputs: dict[str, Any], cache: Any) -> Any:
        """Replay a step that was prepared; its tokens count."""
        try:
            outputs = step.replay(inputs, cache)
            self._finish(step)
        except BaseException:
            self._roll_back(step)
            raise
        return outputs

    def _may_replay_optimistically(self) -> bool:
        """Whether to replay before the model is looked at: nothing seen so far is against it, nothing is overwritten."""
        return (
            self.watch is not None
            and self.refused is None
            and not self.unpaged
            and self.layers == self.held
            and self.kernels == self.passes.kernels.in_use()
            and self.watch.is_safe()
        )

    def _replay_optimistically(self, inputs: dict[str, Any], kwargs: dict[str, Any], name: str) -> Any:
        """Replay a step that is captured, then verify it; `_NOT_REPLAYED` if that fails, and the step is taken back.

        It has then written to the place of its token alone, which is written again before it is read, and has had pages
        loaded, which are what they are. What the kernels count (`stats`), they count twice.
        """
        watch, state, mask = self.watch, self.state, kwargs.get("attention_mask")
        positions = kwargs.get("position_ids") if state.method.uses_positions else None
        assert watch is not None
        if reason_not_replayed(watch, self.unpaged, kwargs, name) is not None:
            return _NOT_REPLAYED
        self.log.settle(self.layers)
        length, new_valid, held = state.committed + 1, None, state.sequences.mask.valid
        if held is not None and state.method.uses_positions:
            # Where the token of each sequence stands has to be looked up.
            mask = padding_mask_of(mask, length, state.sequences.batch_size)
            new_valid, mask, held = padding_change.take(state, mask), None, None
            if not counts_positions(state, positions, new_valid):
                return _NOT_REPLAYED
            positions = None
        step = self.captured.get(self._key(inputs, new_valid))
        if step is None or not self.replay_check.start(mask, length, positions, held):
            return _NOT_REPLAYED
        try:
            if not self._prepare(new_valid):
                return _NOT_REPLAYED
            outputs = step.replay(inputs, kwargs[name])
            holds = self.replay_check.passed(watch)
            if holds:
                self._finish(step)
        except BaseException:
            self._roll_back()
            raise
        if not holds:
            self._roll_back()
            return _NOT_REPLAYED
        return outputs

    def _prepare(self, new_valid: Tensor | None) -> bool:
        """Begin the step; False, and taken back, if the room for it made pages take a form that no graph so far reads."""
        state = self.state
        before = state.sequences.layout_version
        self.passes.prepare(state.sequences.batch_size, 1, new_valid)
        if state.sequences.layout_version == before:
            return True
        self._roll_back()
        return False

    def _finish(self, step: CapturedStep) -> None:
        self.passes.finish(foresee=True)
        self.log.clear()
        step.state.advance(self.state.committed)

    def _capture(self, forward: Callable[..., Any], inputs: dict[str, Any], cache: dict[str, Any]) -> CapturedStep:
        with torch.inference_mode(False), torch.no_grad():  # static tensors outlive an inference mode
            step = CapturedStep(inputs, self.layers)
            step.fixed = fixed_arguments(self.model(), inputs)
            windows = windows_of(self.layers)
            before = [dict(layer.__dict__) for layer in windows]
            try:
                step.capture(forward, cache, self.passes)
            except BaseException:
                for layer, attributes in zip(windows, before, strict=True):
                    layer.__dict__.update(attributes)
                raise
        return step

    def _is_decode_step(self, kwargs: dict[str, Any]) -> bool:
        new = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        shape = (self.state.sequences.batch_size, 1)
        return isinstance(new, Tensor) and tuple(new.shape[:2]) == shape and self.state.committed > 0

    def _look_at(self, model: nn.Module) -> ModelGuard:
        """The watch over the model; starts anew where the model, the layers or the kernels are others than those captured."""
        kernels = self.passes.kernels.in_use()
        same = kernels == self.kernels and self.layers == self.held
        if self.watch is None or not same or not self.watch.unchanged():
            self.captured.clear()
            self.watch, self.kernels, self.held = ModelGuard(model), kernels, list(self.layers)
            self.unpaged = overwritten(self.layers)
            self.refused = reason_not_captured(model, self.layers, self.state)
        return self.watch

    def _key(self, inputs: dict[str, Any], new_valid: Tensor | None) -> Any:
        padded = self.state.sequences.mask.valid is not None or (new_valid is not None and not bool(new_valid.all()))
        given = tuple(
            (name, (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else value)
            for name, value in inputs.items()
        )
        return given, padded, host_state(), self.state.sequences.layout_version

    def _windows_are_full(self, new_valid: Tensor | None) -> bool:
        """Whether every window is full and free of padding: until then it grows, or needs a mask."""
        windows = windows_of(self.unpaged)
        if any(layer.cumulative_length < layer.sliding_window for layer in windows):
            return False
        valid = self.state.sequences.mask.valid
        if not windows or (valid is None and new_valid is None):
            return True
        widest = max(layer.sliding_window for layer in windows)
        return (valid is None or bool(valid[:, -widest:].all())) and (new_valid is None or bool(new_valid.all()))

    def _roll_back(self, step: CapturedStep | None = None) -> None:
        """After a step that failed, or should not have been: only the host's count makes its tokens count.

        Args:
            step: what was replayed, if that may have overwritten states.
        """
        self.log.clear()
        self.log.overwritten = step is not None and step.overwrites
        self.passes.roll_back()


def _warn(model: nn.Module, reason: str) -> None:
    said = _warned.setdefault(model, set())
    if reason not in said:
        said.add(reason)
        logger.warning("%s decodes eagerly, not as a CUDA graph: %s", type(model).__name__, reason)
