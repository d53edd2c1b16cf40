"""Operations on a cache between two forwards (`crop`, `reset`, a selection of sequences): all of one happens, or nothing.

    undone(...)      what there was is kept  ->  the operation  ->  it counts
                     interrupted: what there was comes back, at once
    finished(...)    what cannot fail, and may be done twice; interrupted: it is done again, at once

Where an interruption comes while something is put right, that is left in `CacheState.unfinished`, and done before the cache is
used again (`CacheState.settle`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .state import CacheState


class _Past:
    """What an operation is about to change: tables and tensors by reference, as none is changed in place.

    Args:
        state: of the paged layers.
        unpaged: transformers' own layers.
    """

    def __init__(self, state: CacheState, unpaged: list[Any]) -> None:
        self.state, self.committed, self.tables = state, state.committed, state.sequences.tables()
        self.unpaged = [(layer, own_attributes(layer)) for layer in unpaged]
        self.observation_queries: list[Tensor | None] = [layer.observation_queries for layer in state.layers]
        self.lengths = [(layer.store, layer.store.length) for layer in state.layers if layer.store is not None]

    def restore(self) -> None:
        """Bring it back. May be repeated."""
        for layer, attributes in self.unpaged:
            layer.__dict__.clear()
            layer.__dict__.update({name: _own(held) for name, held in attributes.items()})
        for paged, queries in zip(self.state.layers, self.observation_queries, strict=True):
            paged.observation_queries = queries
        for store, length in self.lengths:
            store.length = length
        self.state.sequences.restore(self.tables)
        self.state.committed = self.committed
        self.state.visible_length.fill_(self.committed)


@contextmanager
def undone(state: CacheState, unpaged: list[Any]) -> Iterator[None]:
    """An operation that changes a cache between two forwards: where it fails, nothing has changed.

    Args:
        state: of the paged layers; nothing is unfinished.
        unpaged: transformers' own layers. What they hold is replaced, not written to.
    """
    past = _Past(state, unpaged)
    try:
        state.unfinished = past.restore
        yield
        state.unfinished = None
    except BaseException:
        state.settle()
        raise


def finished(state: CacheState, act: Callable[[], None]) -> None:
    """Do `act`, which may be done twice: where it is interrupted it is done once more, or before the cache is used again."""
    try:
        state.unfinished = act
        act()
        state.unfinished = None
    except Exception:  # memory, perhaps: there may be some later
        raise
    except BaseException:
        state.settle()
        raise


def own_attributes(layer: Any) -> dict[str, Any]:
    """What one of transformers' layers holds. Its tables of states are changed in place, so these are copied."""
    return {name: _own(held) for name, held in layer.__dict__.items()}


def _own(held: Any) -> Any:
    return dict(held) if isinstance(held, dict) else held
