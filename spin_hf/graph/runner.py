"""The captured decode step: `model.forward` of one new token per sequence, replayed as a CUDA graph.

    first call of a shape    eager; compiles kernels, allocates buffers
    second call              captured, then replayed
    later calls              host: pages for the token, descriptors, inputs  ->  replay  ->  host: commit

Later calls may be those of another cache with the same model and options: graphs belong to the kernels that caches take over
from each other (`backends/kernel_pool.py`).

Host work is done before the replay (`ForwardPass.prepare`) and after it (`finish`); in between, layers only launch. Inputs are
copied to static tensors, and outputs are returned as copies. Unpaged layers (windows, linear attention) use static tensors,
which the last launches of the step update.

The device is idle until the replay is launched. If all layers are paged, the step is therefore replayed optimistically: it is
launched first and checked afterwards (`graph/replay_check.py`). On a mismatch it is rolled back and run with the checks first:

    optimistic       addresses  ->  replay  ->  check model and mask  ->  commit, or roll back and continue below
    checked first    check model and mask  ->  replay, capture or eager forward

During capture `get_seq_length` returns a device tensor, so positions that a model derives from it are correct in every replay.
A model that reads this tensor, or any other, on the host cannot be captured. It runs eagerly, with one warning that says why.
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
from ..integration.forward_hook import new_inputs
from ..integration.rank_agreement import meeting
from ..state import CacheState
from .eligibility import (
    ModelGuard,
    ModelRecord,
    fixed_arguments,
    host_state,
    launch_devices,
    reason_not_captured,
    reason_not_replayed,
)
from .recorder import Recorder
from .replay_check import ReplayCheck
from .static_states import StaticStates, advance, layout_of, overwritten, windows_of

logger = logging.getLogger("spin_hf")

_MAX_SHAPES = 8
"""Captured graphs per cache, one per shape and mode. The oldest one is dropped to make a new one."""

_warned: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()
_CACHE = object()
"""Placeholder for the cache in stored outputs, so that a graph does not keep the cache alive."""
_NOT_REPLAYED = object()
"""Returned instead of outputs if a step was not replayed optimistically, or was and has been rolled back."""


class CapturedStep:
    """One captured call of a forward.

    Args:
        inputs: its arguments, without mask and cache.
        layers: of the cache.
        devices: that it launches on, that of its inputs first.
    """

    def __init__(self, inputs: dict[str, Any], layers: list[Any], devices: list[torch.device]) -> None:
        self.inputs = {name: given.clone() if isinstance(given, Tensor) else given for name, given in inputs.items()}
        self.state = StaticStates(layers)
        self.fixed: dict[str, Any] = {}
        """Arguments that are the same at every replay."""
        self.device, self.recorder = devices[0], Recorder(devices)
        self.outputs: list[Any] = []
        self.outputs_spec: Any = None
        self.overwrites = False
        """Whether the latest replay has overwritten its inputs and cannot be repeated."""

    def capture(self, forward: Callable[..., Any], cache: dict[str, Any], passes: ForwardPass) -> None:
        """Capture the call. Nothing is computed yet.

        Args:
            cache: argument name -> the cache.
        """
        layers = next(iter(cache.values())).layers

        def step() -> Any:
            with passes.capturing(self.device):
                outputs = forward(**self.inputs, **self.fixed, **cache)
            self.state.bind(layers)
            return outputs

        self.state.bind(layers)
        outputs = self.recorder.record(step)
        leaves, self.outputs_spec = pytree.tree_flatten(outputs)
        (held,) = cache.values()
        self.outputs = [_CACHE if leaf is held else leaf for leaf in leaves]

    def detach(self) -> None:
        """Leave the cache that it was replayed for: another one takes over the kernels."""
        self.state.detach()

    def replay(self, inputs: dict[str, Any], cache: Any) -> Any:
        """Replay the step with new `inputs` for a cache; returns copies of its outputs."""
        self.overwrites, copies = False, None
        for name, static in self.inputs.items():
            if isinstance(static, Tensor):
                static.copy_(inputs[name], non_blocking=True)
        self.state.bind(cache.layers)
        if self.state.tensors:  # allocate before the launch: the step cannot be repeated if an allocation fails
            copies = [torch.empty_like(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self.outputs]
            self.overwrites = True
        self.recorder.replay()
        leaves = [cache if leaf is _CACHE else leaf for leaf in self.outputs]
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                leaves[index] = leaf.clone() if copies is None else copies[index].copy_(leaf)
        return pytree.tree_unflatten(leaves, self.outputs_spec)


class GraphRunner:
    """The decode steps of one cache on one model.

    Args:
        model: the model with the wrapped forward. Its parameters are kept alive once a step has run, as graphs read them.
        layers, passes, log: of the cache.
    """

    def __init__(self, model: nn.Module, layers: list[Any], passes: ForwardPass, log: ForwardLog) -> None:
        self.model = weakref.ref(model)
        self.layers, self.passes, self.log = layers, passes, log
        self.state: CacheState = passes.state
        self.watch: ModelGuard | None = None
        self.record: ModelRecord | None = None
        """The pool's record of the model when `watch` was compared with it."""
        self.replay_check = ReplayCheck()
        self.kernels: list[Any] = []
        self.held: list[Any] = []
        """The layers at capture. `reset` of the cache replaces unpaged ones."""
        self.unpaged: list[Any] = []
        """The layers in `held` with tensors that a step overwrites."""
        self.refused: str | None = None
        """Why steps of this model are not captured; None if they may be."""
        self._layout: tuple[tuple[int, int], int] | None = None
        """Version of the page layout and batch size, and the pool's number for the layout then."""

    @property
    def captured(self) -> dict[Any, CapturedStep | None]:
        """Key of a call -> its graph; None if it has run once, eagerly."""
        return self.kernels[0].graphs if self.kernels else {}

    def run(self, model: nn.Module, forward: Callable[..., Any], kwargs: dict[str, Any], name: str) -> Any:
        """Call `forward(**kwargs)`, or replay its graph if that is equivalent. The cache is `kwargs[name]`.

        Raises:
            Whatever the forward raises; BudgetError, CapacityError, BatchSizeError before any work.
        """
        if self._is_decode_step(kwargs):
            return self._run(model, forward, kwargs, name)
        outputs = self._eager(forward, kwargs)
        if not self.passes.backends.row_sizes and _is_computing(self.passes.backends.in_use()):
            self._guard_of(model)  # else the first step behind the prompt would, while the device is idle
            self._layout_number()
        return outputs

    def _eager(self, forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """Call the forward itself. If it fails, even after the last layer, the cache is as before."""
        with self.log.watching(self.layers):
            return forward(**kwargs)

    def _run(self, model: nn.Module, forward: Callable[..., Any], kwargs: dict[str, Any], name: str) -> Any:
        inputs = {key: given for key, given in kwargs.items() if key not in ("attention_mask", name)}
        if self._may_replay_optimistically():
            outputs = self._replay_optimistically(inputs, kwargs, name)
            if outputs is not _NOT_REPLAYED:
                return outputs
        watch = self._guard_of(model)
        reason = self.refused or reason_not_replayed(watch, self.unpaged, kwargs, name)
        if reason is not None:
            warn_eager(model, reason)
            return self._eager(forward, kwargs)
        self.log.settle(self.layers)
        length, batch_size = self.state.committed + 1, self.state.sequences.batch_size
        new_valid = padding_change.take(self.state, padding_mask_of(kwargs.get("attention_mask"), length, batch_size))
        counts = counts_positions(self.state, kwargs.get("position_ids"), new_valid)
        if not counts or not self._windows_are_full(new_valid):
            return self._eager(forward, kwargs)  # raises if the positions do not count the tokens
        key, captured = self._key(inputs, new_valid), self.captured
        if key not in captured:
            while len(captured) >= _MAX_SHAPES:
                del captured[next(iter(captured))]
            captured[key] = None
            return self._eager(forward, kwargs)
        step = captured[key]
        try:
            prepared = self._prepare(new_valid)
            if prepared and step is None:
                with meeting(self.state.ranks, "capture a step"):
                    made = self._capture(forward, inputs, {name: kwargs[name]})
                step = captured[key] = made
        except Exception as error:
            self._roll_back()
            if step is not None or isinstance(error, (SpinError, MemoryError)):
                raise
            reason = f"capturing failed: {str(error).strip().splitlines()[0] if str(error) else repr(error)}"
            if isinstance(error, torch.OutOfMemoryError):
                captured.pop(key, None)  # the next step of this shape runs eagerly, the one after it is captured again
            else:
                self.refused = reason
            warn_eager(model, reason)
            return self._eager(forward, kwargs)
        except BaseException:
            self._roll_back()
            raise
        if step is None or not prepared:
            return self._eager(forward, kwargs)
        return self._replay(step, inputs, kwargs[name])

    def _replay(self, step: CapturedStep, inputs: dict[str, Any], cache: Any) -> Any:
        """Replay a prepared step and commit it."""
        try:
            outputs = step.replay(inputs, cache)
            self._finish()
        except BaseException:
            self._roll_back(step)
            raise
        return outputs

    def _may_replay_optimistically(self) -> bool:
        """Whether to replay before the model is checked: a roll back is possible and no change is known."""
        return (
            self.watch is not None
            and self.refused is None
            and not self.unpaged
            and self.layers == self.held
            and self.kernels == self.passes.backends.in_use()
            and self.record is self.passes.backends.pool.record  # no cache has seen another model since
            and self.watch.is_safe()
        )

    def _replay_optimistically(self, inputs: dict[str, Any], kwargs: dict[str, Any], name: str) -> Any:
        """Replay a captured step, then check it. If the check fails, roll the step back and return `_NOT_REPLAYED`.

        A rolled back step has written only its own token, which is written again before it is read, and has loaded pages,
        which stay valid. The kernels' counters (`stats`) count such a step twice.
        """
        watch, state, mask = self.watch, self.state, kwargs.get("attention_mask")
        positions = kwargs.get("position_ids") if state.method.uses_positions else None
        assert watch is not None
        if reason_not_replayed(watch, self.unpaged, kwargs, name) is not None:
            return _NOT_REPLAYED
        self.log.settle(self.layers)
        length, new_valid, held = state.committed + 1, None, state.sequences.mask.valid
        if held is not None and state.method.uses_positions:
            # Positions differ per sequence and are read from the padding mask before the replay.
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
            passed = self.replay_check.passed(watch)
            if passed:
                self._finish()
        except BaseException:
            self._roll_back()
            raise
        if not passed:
            self._roll_back()
            return _NOT_REPLAYED
        return outputs

    def _prepare(self, new_valid: Tensor | None) -> bool:
        """Begin the step. If allocating its pages changed the page layout, which graphs depend on: roll back, return False."""
        state = self.state
        before = state.sequences.layout_version
        self.passes.prepare(state.sequences.batch_size, 1, new_valid)
        if state.sequences.layout_version == before:
            return True
        self._roll_back()
        return False

    def _finish(self) -> None:
        self.passes.finish(upload_next=True)
        self.log.clear()
        advance(self.layers, self.state.committed)

    def _capture(self, forward: Callable[..., Any], inputs: dict[str, Any], cache: dict[str, Any]) -> CapturedStep:
        with torch.inference_mode(False), torch.no_grad():  # static tensors outlive inference mode
            model = self.model()
            assert model is not None
            step = CapturedStep(inputs, self.layers, launch_devices(model, inputs))
            step.fixed = fixed_arguments(model, inputs)
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
        new, shape = new_inputs(kwargs), (self.state.sequences.batch_size, 1)
        return new is not None and tuple(new.shape[:2]) == shape and self.state.committed > 0

    def _guard_of(self, model: nn.Module) -> ModelGuard:
        """The guard of the model. Drops all graphs if the model has changed since they were captured."""
        kernels, pool = self.passes.backends.in_use(), self.passes.backends.pool
        watch = self.watch
        if watch is None or not watch.unchanged():
            watch, self.record = ModelGuard(model), None
        seen = self.record
        if seen is None or seen is not pool.record:  # another cache may have seen another change
            if pool.record is None or not pool.record.describes(watch):
                pool.forget_graphs(ModelRecord(watch))
            self.watch, self.record = watch, pool.record
        if seen is not self.record or self.held != self.layers or self.kernels != kernels:
            self.kernels, self.held = kernels, list(self.layers)
            self.unpaged, self._layout = overwritten(self.layers), None
            self.refused = reason_not_captured(model, self.layers, self.state)
        return watch

    def _key(self, inputs: dict[str, Any], new_valid: Tensor | None) -> Any:
        padded = self.state.sequences.mask.valid is not None or (new_valid is not None and not bool(new_valid.all()))
        given = tuple(
            (name, (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else value)
            for name, value in inputs.items()
        )
        dense = self.passes.backends.read_all(self.state.committed + 1)
        return given, padded, host_state(), self._layout_number(), dense, *self.kernels[1:]

    def _layout_number(self) -> int:
        """A number for the layout of pages and of full windows, equal for caches with the same layout."""
        version = self.state.sequences.layout_version, self.state.sequences.batch_size
        if self._layout is None or self._layout[0] != version:
            backends = self.passes.backends
            found = [(layer, backends.kernels_of(layer)) for layer in self.state.layers]
            pages = tuple(kernels.layout(layer) for layer, kernels in found if kernels is not None)
            self._layout = version, backends.pool.number_of((pages, layout_of(self.unpaged)))
        return self._layout[1]

    def _windows_are_full(self, new_valid: Tensor | None) -> bool:
        """Whether every window is full and has no padding. Otherwise its tensors grow or need a mask."""
        windows = windows_of(self.unpaged)
        if any(layer.cumulative_length < layer.sliding_window for layer in windows):
            return False
        valid = self.state.sequences.mask.valid
        if not windows or (valid is None and new_valid is None):
            return True
        widest = max(layer.sliding_window for layer in windows)
        return (valid is None or bool(valid[:, -widest:].all())) and (new_valid is None or bool(new_valid.all()))

    def _roll_back(self, step: CapturedStep | None = None) -> None:
        """Roll back a step that failed or should not have been replayed. Resetting the host's token count is enough.

        Args:
            step: the replayed step, if it may have overwritten states; else None.
        """
        self.log.clear()
        self.log.overwritten = step is not None and step.overwrites
        self.passes.roll_back()


def _is_computing(kernels: list[Any]) -> bool:
    """Whether a GPU of these kernels has not ended what was launched, so that work of the host costs no time."""
    gpus = [step.device for step in kernels if step.device.type == "cuda"]
    if not gpus or torch.cuda.is_current_stream_capturing():
        return False
    return not all(torch.cuda.current_stream(device).query() for device in gpus)


def warn_eager(model: nn.Module, reason: str) -> None:
    """Log, once for each model and reason, that steps are not captured."""
    said = _warned.setdefault(model, set())
    if reason not in said:
        said.add(reason)
        logger.warning("%s decodes eagerly, not as a CUDA graph: %s", type(model).__name__, reason)
