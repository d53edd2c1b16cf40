"""Undo log of the current forward: which layers it has changed, and how to roll them back.

    watched      call of a model whose `forward` is wrapped (`graph/model_calls.py`): return commits, an exception rolls back
    unwatched    first forward of a cache made from a config, or layers called by hand: the last layer that holds tokens
                 commits

    roll back    paged layers        truncated to their length before the forward
                 attention layers    previous tensors restored: transformers replaces them and does not write into them
                 linear attention    overwritten in place: restored from a copy, which is made before the first read

A forward is atomic over all layers. A watched forward may skip layers (truncated stack, early exit). Skipped layers then hold
fewer tokens, as in transformers' caches. If an unwatched forward ends early outside of the cache's code, the log cannot know
whether it was interrupted. The next use then raises, and the caller may call `SpinCache.roll_back`. Nothing is logged during
Dynamo tracing; the last paged layer commits there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, LinearAttentionCacheLayerMixin

from .errors import AttentionError, CacheStateError
from .forward_pass import ForwardPass
from .integration.layer_types import is_placeholder
from .layer import SpinLayer
from .transaction import own_attributes

_TABLES = ("conv_states", "recurrent_states")
"""Attributes of linear-attention layers that hold states: index -> tensor or None."""


@dataclass
class Progress:
    """Progress of one forward. The forward ends when `ForwardLog.present` is replaced, which is a single assignment.

    Attributes:
        held: tokens in the cache before the forward; None while no layer has changed.
        last: the layer that changed last; -1 for none.
        seen: layers that changed. Models with loops do not visit them in ascending order.
        before: layer index -> its attributes before the forward.
        after_final: states of the layers after the final one before an unwatched forward, with their versions.
    """

    held: int | None = None
    last: int = -1
    seen: set[int] = field(default_factory=set)
    before: dict[int, dict[str, Any]] = field(default_factory=dict)
    after_final: list[tuple[Tensor, int]] = field(default_factory=list)


class ForwardLog:
    """Changes of the forward in progress.

    Args:
        layers: the cache's layers.
        passes: forwards over the paged ones.
    """

    def __init__(self, layers: list[Any], passes: ForwardPass) -> None:
        self.passes, self.state = passes, passes.state
        holding = [index for index, layer in enumerate(layers) if not is_placeholder(layer)]
        attending = [index for index in holding if isinstance(layers[index], CacheLayerMixin)]
        self.final = (attending or holding or [-1])[-1]
        """The last attention layer, or else the last layer with storage. It commits an unwatched forward."""
        self.present = Progress()
        self.overwritten = False
        """Whether a failed step has overwritten states. The cache is then unusable until `reset`."""
        self.watched = False
        """Whether the forward is a wrapped call, so that its end is seen."""

    @property
    def last(self) -> int:
        """The layer that changed last; -1 while nothing is in progress."""
        return self.present.last

    @contextmanager
    def watching(self, layers: list[Any]) -> Iterator[None]:
        """Watch a call of the model: commit when it returns, roll back when it raises.

        If the roll back fails, for instance for lack of memory, it is repeated before the cache is used again.
        """
        self.settle(layers)
        progress = self.present = Progress(self.state.committed, before=_copies(layers))
        try:
            self.watched = True
            yield
            self._end(progress)
        except BaseException:
            if self.present is progress:
                self.passes.fail()
                self.state.pending = None  # the call's own error is raised
                with suppress(Exception):
                    self.settle(layers)
            raise
        finally:
            self.watched = False

    def _end(self, progress: Progress) -> None:
        """Commit a watched forward that has returned, in the layers that it reached."""
        state = self.state
        if state.layers and progress.last < 0 and state.sequences.length == progress.held:
            raise AttentionError(
                f"{state.model_name}: the call was given a SpinCache and no layer used it, expected at least one to; "
                "in training mode gradient checkpointing drops the cache: call model.gradient_checkpointing_disable() or "
                "model.eval()"
            )
        if not state.prepared:
            self.passes.check_nothing_pending()
            if state.committed != state.sequences.length:
                self.passes.commit()
                state.visible_length.fill_(state.committed)
        self.clear()

    def may_begin(self, layers: list[Any]) -> None:
        """Copy the states of linear attention. An unwatched forward may write into them before it calls `touch`."""
        if torch.compiler.is_compiling() or self.watched:
            return
        if self.present.held is None and not self.present.before:
            self.present = Progress(before=_copies(layers))

    def touch(self, index: int, layers: list[Any]) -> None:
        """Log that layer `index` is about to change. A second change of the same layer begins a new forward."""
        layer = layers[index]
        linear = isinstance(layer, LinearAttentionCacheLayerMixin)
        if index in self.present.seen and not (index == self.present.last and linear):
            if self.watched:  # the model runs its layers more than once in a call
                self.passes.commit()
                self.present.seen.clear()
            else:
                self.settle(layers)
        self.may_begin(layers)
        present = self.present
        if present.held is None:
            present.after_final = [
                (state, _version(state)) for layer in layers[self.final + 1 :] for state in _states(layer)
            ]
            present.held = self.state.committed
        present.last = index
        present.seen.add(index)
        self.passes.commits_with_last_paged = isinstance(layers[self.final], SpinLayer)
        if index not in present.before and isinstance(layer, DynamicLayer):
            present.before[index] = own_attributes(layer)

    def touched(self, index: int, layers: list[Any]) -> None:
        """Log that layer `index` has changed. A final layer without pages commits the forward."""
        if torch.compiler.is_compiling() or self.state.prepared:
            return
        if index == self.final and not isinstance(layers[index], SpinLayer):
            self.passes.commit()

    def settle(self, layers: list[Any]) -> None:
        """Close the last forward before the cache is used: roll it back if it failed, else clear the log.

        Raises:
            CacheStateError: it cannot be rolled back, or it is unknown whether it was interrupted.
        """
        if self.watched and not self.state.failed:
            return  # called within a forward: some layers build their own masks
        self.state.settle()
        if self.overwritten:
            raise self._lost()
        if self.state.failed or (self.present.last >= 0 and self.state.pending is not None):
            self.roll_back(layers)
            return
        if not self.is_complete(layers):
            raise CacheStateError(
                f"a forward of {self.state.model_name} ended after layer {self.present.last}, expected it to reach layer "
                f"{max(self.final, len(layers) - 1)}, and a cache that was made from a config is not told why; call "
                "cache.roll_back() if it was interrupted, which forgets its tokens; use SpinCache(model), which is "
                "told, with a model that leaves layers out"
            )
        if self.present.last < 0 and self.state.committed != self.state.sequences.length and not self.state.prepared:
            self.passes.roll_back()  # a step failed before any layer changed
        self.clear()

    def check_layer(self, index: int, layers: list[Any]) -> None:
        """Raise CacheStateError if layer `index` of the model is not in the cache. The forward is rolled back first."""
        if index < len(layers):
            return
        self.drop_pending()
        self.passes.fail()
        self.roll_back(layers)
        raise CacheStateError(
            f"the cache has {len(layers)} layers, as {self.state.model_name} has, got layer {index} of a model that has more; "
            "make a SpinCache of the model that uses it"
        )

    def can_settle(self, layers: list[Any]) -> bool:
        """Whether `settle` would succeed, as far as the log knows."""
        return not self.overwritten and (self.state.failed or self.is_complete(layers))

    def is_complete(self, layers: list[Any]) -> bool:
        """Whether the unwatched forward has reached every layer, as far as the layers show. True if there is none."""
        present, state = self.present, self.state
        if present.last < 0:
            return not any(_written(layers[index], attributes) for index, attributes in present.before.items())
        if state.layers and state.committed == present.held:
            return False  # the paged layers have committed no token
        reached = self.final in present.seen and state.committed == state.sequences.length
        changed = any(version < 0 or _version(state) != version for state, version in present.after_final)
        return reached and (not present.after_final or max(present.seen) > self.final or changed)

    def drop_pending(self) -> None:
        """Mark the forward as failed if a layer was updated and has not attended yet."""
        if self.state.pending is not None:
            self.passes.fail()
        self.state.pending = self.state.new_token_validity = None

    def roll_back(self, layers: list[Any]) -> None:
        """Roll back the forward in progress. May be repeated.

        Raises:
            CacheStateError: it has overwritten states that cannot be restored.
            AttentionError: a layer's keys never reached the attention function.
        """
        present, state = self.present, self.state
        if self.overwritten:
            raise self._lost()
        for index, attributes in present.before.items():
            layers[index].__dict__.clear()
            layers[index].__dict__.update(attributes)
        lost, state.new_token_validity = state.pending, None
        self.passes.roll_back(present.held)
        state.pending = lost
        try:
            self.passes.check_nothing_pending()
        finally:
            self.clear()

    def _lost(self) -> CacheStateError:
        return CacheStateError(
            f"a forward of {self.state.model_name} was interrupted after it had overwritten the state of linear-attention "
            "layers or windows, expected it to reach the last layer; call cache.reset() and start anew"
        )

    def clear(self) -> None:
        """Start with an empty log: no forward is in progress."""
        self.overwritten = False
        self.passes.forget_failure()
        self.passes.commits_with_last_paged = True
        self.present = Progress()


def _states(layer: Any) -> Iterator[Tensor]:
    """The states of a linear-attention layer; nothing for other layers."""
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for table in _TABLES:
            yield from (state for state in getattr(layer, table, {}).values() if isinstance(state, Tensor))


def _version(state: Tensor) -> int:
    """The version counter of `state`; -1 where torch does not count writes (inference tensors, kernels on a GPU)."""
    return -1 if state.is_inference() or state.is_cuda else state._version


def _copies(layers: list[Any]) -> dict[int, dict[str, Any]]:
    """Layer index -> attributes of each linear-attention layer, with copies of the states that a forward overwrites."""
    found = {}
    for index, layer in enumerate(layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            attributes = found[index] = own_attributes(layer)
            for table in _TABLES:
                for number, state in attributes.get(table, {}).items():
                    if isinstance(state, Tensor):
                        attributes[table][number] = state.clone()
    return found


def _written(layer: Any, attributes: dict[str, Any]) -> bool:
    """Whether the states of a linear-attention layer differ from the copies in `attributes`."""
    pairs = [
        (state, attributes[table][number]) for table in _TABLES for number, state in getattr(layer, table, {}).items()
    ]
    return any(isinstance(held, Tensor) and not torch.equal(held, copy) for held, copy in pairs)
