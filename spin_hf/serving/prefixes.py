"""Prefixes that several waiting requests share: each is read once, and forked for every request that begins with it.

    waiting   [ document ][ question 1 ]     [ document ][ question 2 ]     [ document ][ question 3 ]
    read      [ document ] -> held as a cache -> forks share its pages

A prefix is dropped when no waiting request begins like it, or when memory is short.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

from ..cache import SpinCache
from ..integration.layer_types import is_croppable
from ..persistence.prompt_identity import common_length

_LEAST_TOKENS = 128
"""Shorter common beginnings are read again."""
_COMPARED = 32
"""Waiting requests that a prompt is compared with."""
_MOST = 8
"""Prefixes held at once."""


@dataclass(eq=False)
class Prefix:
    """Tokens that were read once.

    Attributes:
        ids: the tokens.
        cache: holds them; nobody steps it.
    """

    ids: array[int]
    cache: SpinCache


def may_crop(cache: SpinCache) -> bool:
    """Whether a fork of a cache can end before its last token."""
    return all(is_croppable(layer) for layer in cache.layers)


class SharedPrefixes:
    """The prefixes of one loop."""

    def __init__(self) -> None:
        self.held: list[Prefix] = []

    def fork_for(self, ids: array[int]) -> SpinCache | None:
        """A fork with the longest prefix of a prompt, without its last token; None if there is none."""
        best, most = self._best_for(ids)
        if best is None:
            return None
        fork = best.cache.fork()
        if most < len(best.ids):
            fork.crop(most - len(best.ids))
        self.held.remove(best)
        self.held.append(best)  # the last one used
        return fork

    def longest(self, ids: array[int]) -> int:
        """Tokens of a prompt that `fork_for` would share."""
        best, most = self._best_for(ids)
        return 0 if best is None else most

    def _best_for(self, ids: array[int]) -> tuple[Prefix | None, int]:
        best, most = None, _LEAST_TOKENS - 1
        for prefix in self.held:
            common = min(common_length(prefix.ids, ids, 0), len(ids) - 1)
            whole = common == len(prefix.ids)
            if common > most and (whole or may_crop(prefix.cache)):
                best, most = prefix, common
        return best, most

    def boundary(self, ids: array[int], held: int, waiting: Iterable[array[int]]) -> int | None:
        """Tokens after which the cache of a prompt should be kept for waiting requests; None if they share no more.

        Args:
            ids: the prompt.
            held: tokens that its cache has, or that are kept already.
            waiting: prompts of the requests that come next.
        """
        longest, head = 0, ids[:_LEAST_TOKENS]
        compared = 0
        for other in waiting:
            if other[:_LEAST_TOKENS] != head:
                continue
            longest = max(longest, common_length(other, ids, len(head)))
            compared += 1
            if compared == _COMPARED:
                break
        longest = min(longest, len(ids) - 1)
        return longest if longest >= _LEAST_TOKENS and longest > held else None

    def keep(self, ids: array[int], cache: SpinCache) -> None:
        """Hold a fork of a cache that has exactly these tokens."""
        self.held.append(Prefix(ids, cache.fork()))
        del self.held[:-_MOST]

    def drop_unused(self, waiting: Iterable[array[int]]) -> None:
        """Drop prefixes that no waiting prompt begins like."""
        if self.held:
            heads = {other[:_LEAST_TOKENS].tobytes() for other in waiting}
            self.held = [prefix for prefix in self.held if prefix.ids[:_LEAST_TOKENS].tobytes() in heads]

    def drop_all(self) -> bool:
        """Drop all prefixes. Returns whether there were any."""
        dropped, self.held = bool(self.held), []
        return dropped
