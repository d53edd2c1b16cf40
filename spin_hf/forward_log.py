"""The present forward: what it has changed so far, and how to take that back if it does not come to its end.

    watched      a call of a model whose `forward` is wrapped (`graph/model_calls.py`): its return commits, an exception takes
    back
    unwatched    a cache made from a config, or layers called by hand: the last layer that holds tokens commits

    taken back   paged layers        are cut back to the length before
                 attention layers    get back the tensors they had: transformers replaces them and does not write into them
                 linear attention    is overwritten in place, and gets back a copy, which is made before it is first read

So a forward happens to the whole cache or not at all. A watched forward may leave layers out: a stack that was cut, an early
exit. These layers then hold fewer tokens, as in transformers' caches. Of an unwatched forward that ends early nobody knows
whether it was interrupted, unless that was in the cache's own code: what comes next is refused, and `SpinCache.roll_back`
says that it was. While Dynamo traces nothing is logged; there the last paged layer commits.
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
"""Where layers of linear attention keep states: number -> tensor, or None."""


@dataclass
class Progress:
    """How far a forward has come. It ends where another object takes the place of its own: at one instant.

    Attributes:
        held: tokens that the cache held before; None while nothing has changed.
        last: the layer that changed last; -1 for none.
        seen: layers that changed. In models with loops their numbers do not grow.
        before: attributes that layers had before.
        behind: states of layers behind the final one before an unwatched forward, with their versions.
    """

    held: int | None = None
    last: int = -1
    seen: set[int] = field(default_factory=set)
    before: dict[int, dict[str, Any]] = field(default_factory=dict)
    behind: list[tuple[Tensor, int]] = field(default_factory=list)


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
        """The last layer that attends, or the last that holds anything: when it has the tokens, an unwatched forward counts."""
        self.present = Progress()
        self.overwritten = False
        """Whether a step that failed has overwritten states, and the cache is of no use until `reset`."""
        self.watched = False
        """Whether the end of the forward will be seen."""

    @property
    def last(self) -> int:
        """The layer that changed last; -1 while nothing is in progress."""
        return self.present.last

    @contextmanager
    def watching(self, layers: list[Any]) -> Iterator[None]:
        """A call of the model: it happens whole or, if it fails wherever that is, not at all.

        What cannot be taken back at once, as memory is short, is taken back before the cache is used again.
        """
        self.settle(layers)
        mine = self.present = Progress(self.state.committed, before=_copies(layers))
        try:
            self.watched = True
            yield
            self._end(mine)
        except BaseException:
            if self.present is mine:
                self.passes.fail()
                self.state.pending = None  # an error says enough
                with suppress(Exception):
                    self.settle(layers)
            raise
        finally:
            self.watched = False

    def _end(self, mine: Progress) -> None:
        """The watched forward has returned: what it appended counts, in the layers that it came to."""
        state = self.state
        if state.layers and mine.last < 0 and state.sequences.length == mine.held:
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
        """An unwatched forward may come: layers of linear attention may write into what they read, and say so later."""
        if not self.watched and self.present.held is None and not self.present.before:
            self.present = Progress(before=_copies(layers))

    def touch(self, index: int, layers: list[Any]) -> None:
        """Note that layer `index` is about to change; a layer that comes round again begins a new forward."""
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
            present.behind = [
                (state, _version(state)) for layer in layers[self.final + 1 :] for state in _states(layer)
            ]
            present.held = self.state.committed
        present.last = index
        present.seen.add(index)
        self.passes.commits_with_last_paged = isinstance(layers[self.final], SpinLayer)
        if index not in present.before and isinstance(layer, DynamicLayer):
            present.before[index] = own_attributes(layer)

    def touched(self, index: int, layers: list[Any]) -> None:
        """Note that layer `index` has changed; a final layer that is not paged commits the forward."""
        if index == self.final and not isinstance(layers[index], SpinLayer) and not self.state.prepared:
            self.passes.commit()

    def settle(self, layers: list[Any]) -> None:
        """Before the cache is used: a forward that failed is taken back, one that came to its end counts.

        Raises:
            CacheStateError: it cannot be taken back, or nobody knows whether it came to its end.
        """
        if self.watched and not self.state.failed:
            return  # in the middle of a forward: some layers ask for masks of their own
        self.state.settle()
        if self.overwritten:
            raise self._lost()
        if self.state.failed or (self.present.last >= 0 and self.state.pending is not None):
            self.roll_back(layers)
            return
        if not self.is_complete(layers):
            raise CacheStateError(
                f"a forward of {self.state.model_name} ended behind layer {self.present.last}, expected it to reach layer "
                f"{max(self.final, len(layers) - 1)}, and a cache that was made from a config is not told why; call "
                "cache.roll_back() if it was interrupted, which forgets its tokens; use SpinCache(model), which is "
                "told, with a model that leaves layers out"
            )
        if self.present.last < 0 and self.state.committed != self.state.sequences.length and not self.state.prepared:
            self.passes.roll_back()  # a step that could not even be prepared
        self.clear()

    def can_settle(self, layers: list[Any]) -> bool:
        """Whether `settle` raises nothing that the log knows of."""
        return not self.overwritten and (self.state.failed or self.is_complete(layers))

    def is_complete(self, layers: list[Any]) -> bool:
        """Whether an unwatched forward, if there is one, has come to every layer, as far as layers show it."""
        present, state = self.present, self.state
        if present.last < 0:
            return not any(_written(layers[index], attributes) for index, attributes in present.before.items())
        if state.pending is not None:
            return False  # its keys never came to attention
        reached = self.final in present.seen and state.committed == state.sequences.length
        changed = any(version < 0 or _version(state) != version for state, version in present.behind)
        return reached and (not present.behind or max(present.seen) > self.final or changed)

    def drop_pending(self) -> None:
        """A layer that was updated and has not attended never will: its forward was interrupted."""
        if self.state.pending is not None:
            self.passes.fail()
        self.state.pending = self.state.noted = None

    def roll_back(self, layers: list[Any]) -> None:
        """Take back the forward in progress. May be repeated.

        Raises:
            CacheStateError: it has overwritten what is needed for that.
            AttentionError: keys that a layer was given never came to the attention function.
        """
        present, state = self.present, self.state
        if self.overwritten:
            raise self._lost()
        for index, attributes in present.before.items():
            layers[index].__dict__.clear()
            layers[index].__dict__.update(attributes)
        lost, state.noted = state.pending, None
        self.passes.roll_back(present.held)
        self.clear()
        state.pending = lost
        self.passes.check_nothing_pending()

    def _lost(self) -> CacheStateError:
        return CacheStateError(
            f"a forward of {self.state.model_name} was interrupted after it had overwritten the state of linear-attention "
            "layers or windows, expected it to reach the last layer; call cache.reset() and start anew"
        )

    def clear(self) -> None:
        """Nothing is in progress."""
        self.overwritten = False
        self.passes.forget_failure()
        self.passes.commits_with_last_paged = True
        self.present = Progress()


def _states(layer: Any) -> Iterator[Tensor]:
    """The tensors of a layer of linear attention; none of another layer."""
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for table in _TABLES:
            yield from (state for state in getattr(layer, table, {}).values() if isinstance(state, Tensor))


def _version(state: Tensor) -> int:
    """How often `state` was written to, or -1 where torch does not count: under inference mode, and in kernels on a GPU."""
    return -1 if state.is_inference() or state.is_cuda else state._version


def _copies(layers: list[Any]) -> dict[int, dict[str, Any]]:
    """The attributes of layers of linear attention, by number, with copies of their states, which a forward overwrites."""
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
    """Whether a layer of linear attention has other states than these, which are copies."""
    pairs = [
        (state, attributes[table][number]) for table in _TABLES for number, state in getattr(layer, table, {}).items()
    ]
    return any(isinstance(held, Tensor) and not torch.equal(held, copy) for held, copy in pairs)
