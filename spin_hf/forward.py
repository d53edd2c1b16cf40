"""The present forward: what it has changed so far, and how to take that back if it does not reach the last layer.

    update(0) ... update(k)   error, Ctrl-C      the next forward begins with `settle`:
    └── changed so far ──┘                         paged layers       are cut back to the committed length
                                                   attention layers   get back the tensors they had
                                                   linear attention   is overwritten in place: refused until `reset`

The tensors of attention layers are kept by reference: transformers replaces them and does not write into them.
So a forward either happens to the whole cache or not at all. While Dynamo traces nothing is logged; there the last
paged layer commits.

What fails behind the last layer (logits take much memory) is seen where the model's forward is wrapped, and taken back at
once (`watching`). Elsewhere the tokens count by then, as in transformers' caches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from .errors import CacheStateError
from .layer import SpinLayer
from .layer_kinds import is_placeholder
from .shared import SharedState


class ForwardLog:
    """Changes of the forward in progress.

    Args:
        layers: the cache's layers.
        shared: state of the paged ones.
    """

    def __init__(self, layers: list[Any], shared: SharedState) -> None:
        self.shared = shared
        holding = [index for index, layer in enumerate(layers) if not is_placeholder(layer)]
        self.final = holding[-1] if holding else -1
        """The last layer that holds anything; when it has taken the tokens, the forward is committed."""
        self.last = -1
        self.seen: set[int] = set()
        """Layers of the forward in progress; in models with loops their numbers do not grow."""
        self.before: dict[int, dict[str, Any]] = {}
        self.irreversible = False
        self.overwritten = False
        """Whether a step that failed has overwritten states, and the cache is of no use until `reset`."""
        self.watched = False
        """Whether the end of the forward will be seen."""

    @contextmanager
    def watching(self, layers: list[Any]) -> Iterator[None]:
        """A call of the model: if it fails, wherever that is, the cache is as before.

        What cannot be taken back at once, as memory is short, is taken back before the cache is used again.
        """
        self.settle(layers)
        held, self.watched = self.shared.committed, True
        try:
            yield
        except BaseException:
            self.shared.committed = held
            self.shared.pending = None  # an error says enough
            with suppress(Exception):
                self.settle(layers)
            raise
        finally:
            self.watched = False
        if self.shared.committed == self.shared.sequences.length and not self.shared.pending:
            self.clear()

    def touch(self, index: int, layers: list[Any]) -> None:
        """Note that layer `index` is about to change; a layer that comes round again begins a new forward."""
        layer = layers[index]
        linear = isinstance(layer, LinearAttentionCacheLayerMixin)
        if index in self.seen and not (index == self.last and linear):
            self.settle(layers)
        self.last = index
        self.seen.add(index)
        self.shared.commits_with_last_paged = isinstance(layers[self.final], SpinLayer)
        if linear:
            self.irreversible = True
        elif isinstance(layer, DynamicLayer) and index not in self.before:
            self.before[index] = dict(layer.__dict__)

    def touched(self, index: int, layers: list[Any]) -> None:
        """Note that layer `index` has changed; a final layer that is not paged commits the forward."""
        if index == self.final and not isinstance(layers[index], SpinLayer) and not self.shared.prepared:
            self.shared.commit()
            if not self.watched:
                self.clear()

    def settle(self, layers: list[Any]) -> None:
        """Take back a forward that did not reach the last layer.

        Raises:
            CacheStateError: it cannot be taken back.
        """
        self.shared.settle()
        if self.overwritten:
            raise self._lost()
        if self.last < 0:
            if self.shared.committed != self.shared.sequences.length and not self.shared.prepared:
                self.shared.roll_back()  # a step that could not even be prepared
            return
        if (
            self.last == self.final
            and self.shared.committed == self.shared.sequences.length
            and not self.shared.pending
        ):
            self.clear()
            return
        if self.irreversible:
            raise self._lost()
        for index, attributes in self.before.items():
            layers[index].__dict__.clear()
            layers[index].__dict__.update(attributes)
        lost = self.shared.pending
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
        self.last, self.seen, self.before, self.irreversible, self.overwritten = -1, set(), {}, False, False
        self.shared.commits_with_last_paged = True


@contextmanager
def unpaged_or_none(layers: list[Any]) -> Iterator[list[Any]]:
    """Yield layers that are not paged; they get back what they had if an operation on the cache fails inside."""
    before = [{name: _own(held) for name, held in layer.__dict__.items()} for layer in layers]
    try:
        yield layers
    except BaseException:
        for layer, attributes in zip(layers, before, strict=True):
            layer.__dict__.clear()
            layer.__dict__.update(attributes)
        raise


def _own(held: Any) -> Any:
    """Tables of states are changed in place; tensors are not."""
    return dict(held) if isinstance(held, dict) else held
