"""Atomic operations on a cache between two forwards: `crop`, `reset`, selection of sequences.

    undone(...)      snapshot  ->  operation  ->  done        on failure: the snapshot is restored
    finished(...)    idempotent operation  ->  done           on interruption: it is run again

If the restore or the second run is interrupted too, it stays in `CacheState.unfinished`. `CacheState.settle` runs it before
the cache is used again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .state import CacheState


class _Snapshot:
    """State before an operation. Tables and tensors are referenced, not copied: no operation writes into them.

    Args:
        state: of the paged layers.
        unpaged: transformers' own layers.
    """

    def __init__(self, state: CacheState, unpaged: list[Any]) -> None:
        self.state, self.committed, self.tables = state, state.committed, state.sequences.tables()
        self.tokens = state.tokens
        self.unpaged = [(layer, own_attributes(layer)) for layer in unpaged]
        self.of_layers = [(layer.observation_queries, layer.fitted) for layer in state.layers]
        self.lengths = [(layer.store, layer.store.length) for layer in state.layers if layer.store is not None]

    def restore(self) -> None:
        """Restore the state. May be repeated."""
        for layer, attributes in self.unpaged:
            layer.__dict__.clear()
            layer.__dict__.update({name: _own(held) for name, held in attributes.items()})
        for paged, (queries, fitted) in zip(self.state.layers, self.of_layers, strict=True):
            paged.observation_queries, paged.fitted = queries, fitted
        for store, length in self.lengths:
            store.length = length
        self.state.sequences.restore(self.tables)
        self.state.committed, self.state.tokens = self.committed, self.tokens
        self.state.visible_length.fill_(self.committed)


@contextmanager
def undone(state: CacheState, unpaged: list[Any]) -> Iterator[None]:
    """Run the block as one operation: if it fails, nothing has changed.

    Args:
        state: of the paged layers; its `unfinished` is None.
        unpaged: transformers' own layers. The operation replaces their tensors and does not write into them.
    """
    snapshot = _Snapshot(state, unpaged)
    try:
        state.unfinished = snapshot.restore
        yield
        state.unfinished = None
    except BaseException:
        state.settle()
        raise


def finished(state: CacheState, act: Callable[[], None]) -> None:
    """Run the idempotent `act`. If it is interrupted, run it again. If it raises, it runs again before the next use."""
    try:
        state.unfinished = act
        act()
        state.unfinished = None
    except Exception:  # out of memory, for instance: a later run may succeed
        raise
    except BaseException:
        state.settle()
        raise


def own_attributes(layer: Any) -> dict[str, Any]:
    """Attributes of a transformers layer. Its dicts of states are changed in place, so the dicts are copied."""
    return {name: _own(held) for name, held in layer.__dict__.items()}


def _own(held: Any) -> Any:
    return dict(held) if isinstance(held, dict) else held
