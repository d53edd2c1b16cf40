"""The present forward: what it has changed so far, and how to take that back if it does not come to its end.

    watched      a call of a model whose `forward` is wrapped (`calls.py`): its return commits, an exception takes back
    unwatched    a cache made from a config, or layers called by hand: the last layer that holds tokens commits

    taken back   paged layers        are cut back to the committed length
                 attention layers    get back the tensors they had: transformers replaces them and does not write into them
                 linear attention    is overwritten in place: watched, it gets back a copy; else it is refused until `reset`

So a forward happens to the whole cache or not at all. A watched forward may leave layers out: a stack that was cut, an early
exit. These layers then hold fewer tokens, as in transformers' caches. Of an unwatched forward that ends early nobody knows
whether it was interrupted, unless that was in the cache's own code: what comes next is refused, and `SpinCache.roll_back`
says that it was. While Dynamo traces nothing is logged; there the last paged layer commits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, LinearAttentionCacheLayerMixin

from .errors import AttentionError, CacheStateError
from .layer import SpinLayer
from .layer_kinds import is_placeholder
from .shared import SharedState
from .undo import own_attributes

_TABLES = ("conv_states", "recurrent_states")
"""Where layers of linear attention keep states: number -> tensor, or None."""


class ForwardLog:
    """Changes of the forward in progress.

    Args:
        layers: the cache's layers.
        shared: state of the paged ones.
    """

    def __init__(self, layers: list[Any], shared: SharedState) -> None:
        self.shared = shared
        holding = [index for index, layer in enumerate(layers) if not is_placeholder(layer)]
        attending = [index for index in holding if isinstance(layers[index], CacheLayerMixin)]
        self.final = (attending or holding or [-1])[-1]
        """The last layer that attends, or the last that holds anything: when it has the tokens, an unwatched forward counts."""
        self.last = -1
        """The layer that changed last; -1 while nothing is in progress."""
        self.seen: set[int] = set()
        """Layers of the forward in progress. In models with loops their numbers do not grow."""
        self.before: dict[int, dict[str, Any]] = {}
        """Attributes that layers had before."""
        self.behind: list[tuple[Tensor, int]] = []
        """States of layers behind the final one before an unwatched forward, with their versions."""
        self.irreversible = False
        """Whether states were overwritten of which there is no copy."""
        self.overwritten = False
        """Whether a step that failed has overwritten states, and the cache is of no use until `reset`."""
        self.watched = False
        """Whether the end of the forward will be seen."""

    @contextmanager
    def watching(self, layers: list[Any]) -> Iterator[None]:
        """A call of the model: it happens whole or, if it fails wherever that is, not at all.

        What cannot be taken back at once, as memory is short, is taken back before the cache is used again.
        """
        self.settle(layers)
        held = self.shared.committed
        try:
            self.watched = True
            for index, layer in enumerate(layers):
                if isinstance(layer, LinearAttentionCacheLayerMixin):
                    self.before[index] = _with_copies(layer)
            yield
            self._end(held)
        except BaseException:
            self.shared.committed, self.shared.failed = held, True
            self.shared.pending = None  # an error says enough
            with suppress(Exception):
                self.settle(layers)
            raise
        finally:
            self.watched = False

    def _end(self, held: int) -> None:
        """The watched forward has returned: what it appended to `held` tokens counts, in the layers that it came to."""
        shared = self.shared
        if shared.layers and self.last < 0 and shared.sequences.length == held and shared.launched is None:
            raise AttentionError(
                f"{shared.model_name}: the call was given a SpinCache and no layer used it, expected at least one to; "
                "in training mode gradient checkpointing drops the cache: call model.gradient_checkpointing_disable() or "
                "model.eval()"
            )
        if shared.launched is None and not shared.prepared:  # else whoever looks at the cache next ends the step
            shared.check_nothing_pending()
            if shared.committed != shared.sequences.length:
                shared.commit()
                shared.visible_length.fill_(shared.committed)
        self.clear()

    def touch(self, index: int, layers: list[Any]) -> None:
        """Note that layer `index` is about to change; a layer that comes round again begins a new forward."""
        layer = layers[index]
        linear = isinstance(layer, LinearAttentionCacheLayerMixin)
        if index in self.seen and not (index == self.last and linear):
            if self.watched:  # the model runs its layers more than once in a call
                self.shared.commit()
                self.seen.clear()
            else:
                self.settle(layers)
        if self.last < 0 and not self.watched:
            self.behind = [(state, _version(state)) for layer in layers[self.final + 1 :] for state in _states(layer)]
        self.last = index
        self.seen.add(index)
        self.shared.commits_with_last_paged = isinstance(layers[self.final], SpinLayer)
        if index in self.before:
            return
        if linear and _holds_states(layer):
            self.irreversible |= not self.watched
        elif linear or isinstance(layer, DynamicLayer):
            self.before[index] = own_attributes(layer)

    def touched(self, index: int, layers: list[Any]) -> None:
        """Note that layer `index` has changed; a final layer that is not paged commits the forward."""
        if index == self.final and not isinstance(layers[index], SpinLayer) and not self.shared.prepared:
            self.shared.commit()

    def settle(self, layers: list[Any]) -> None:
        """Before the cache is used: a forward that failed is taken back, one that came to its end counts.

        Raises:
            CacheStateError: it cannot be taken back, or nobody knows whether it came to its end.
        """
        if self.watched and not self.shared.failed:
            return  # in the middle of a forward: some layers ask for masks of their own
        self.shared.settle()
        if self.overwritten:
            raise self._lost()
        if self.last < 0 and not self.shared.failed:
            if self.shared.committed != self.shared.sequences.length and not self.shared.prepared:
                self.shared.roll_back()  # a step that could not even be prepared
            return
        if not self.shared.failed and not self.shared.pending:
            if not self.is_complete():
                raise CacheStateError(
                    f"a forward of {self.shared.model_name} ended behind layer {self.last}, expected it to reach layer "
                    f"{max(self.final, len(layers) - 1)}, and a cache that was made from a config is not told why; call "
                    "cache.roll_back() if it was interrupted, which forgets its tokens; use SpinCache(model), which is "
                    "told, with a model that leaves layers out"
                )
            self.clear()
            return
        self.take_back(layers)

    def can_settle(self) -> bool:
        """Whether `settle` raises nothing that the log knows of."""
        return not (self.irreversible or self.overwritten) and (self.shared.failed or self.is_complete())

    def is_complete(self) -> bool:
        """Whether an unwatched forward, if there is one, has come to every layer, as far as layers show it."""
        if self.last < 0:
            return True
        reached = self.final in self.seen and self.shared.committed == self.shared.sequences.length
        changed = any(version < 0 or _version(state) != version for state, version in self.behind)
        return reached and (not self.behind or max(self.seen) > self.final or changed)

    def take_back(self, layers: list[Any]) -> None:
        """Take back the forward in progress. May be repeated.

        Raises:
            CacheStateError: it has overwritten what is needed for that.
            AttentionError: keys that a layer was given never came to the attention function.
        """
        if self.irreversible or self.overwritten:
            raise self._lost()
        for index, attributes in self.before.items():
            layers[index].__dict__.clear()
            layers[index].__dict__.update(attributes)
        lost, self.shared.noted = self.shared.pending, None
        self.shared.roll_back()
        self.clear()
        self.shared.pending = lost
        self.shared.check_nothing_pending()

    def _lost(self) -> CacheStateError:
        return CacheStateError(
            f"a forward of {self.shared.model_name} was interrupted after it had overwritten the state of linear-attention "
            "layers or windows, expected it to reach the last layer; call cache.reset() and start anew"
        )

    def clear(self) -> None:
        """Nothing is in progress."""
        self.last, self.seen, self.before, self.behind = -1, set(), {}, []
        self.irreversible = self.overwritten = self.shared.failed = False
        self.shared.commits_with_last_paged = True


def _states(layer: Any) -> Iterator[Tensor]:
    """The tensors of a layer of linear attention; none of another layer."""
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for table in _TABLES:
            yield from (state for state in getattr(layer, table, {}).values() if isinstance(state, Tensor))


def _holds_states(layer: Any) -> bool:
    """Whether a linear-attention layer has states, which the forward overwrites; what an empty one makes is its own."""
    return any(True for _ in _states(layer))


def _version(state: Tensor) -> int:
    """How often `state` was written to, or -1 where torch does not count: under inference mode, and in kernels on a GPU."""
    return -1 if state.is_inference() or state.is_cuda else state._version


def _with_copies(layer: Any) -> dict[str, Any]:
    """The attributes of a layer of linear attention, with copies of its states, which a forward overwrites."""
    attributes = own_attributes(layer)
    for table in _TABLES:
        for number, state in attributes.get(table, {}).items():
            if isinstance(state, Tensor):
                attributes[table][number] = state.clone()
    return attributes
