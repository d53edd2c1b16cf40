"""Which of the first tokens of a batch are still what they were when somebody looked.

    changes    1: kept 40    4: kept 12    5: kept 30        a crop keeps the first tokens, a reset or another batch none

    unchanged since 0: 12    since 4: 30    since 5: all

Of changes only those are listed whose number of kept tokens is below that of all later ones.
"""

from __future__ import annotations


class Past:
    """Changes to tokens that were held."""

    def __init__(self) -> None:
        self.now = 0
        """How many changes there were."""
        self._kept: list[tuple[int, int]] = []

    def change(self, kept: int) -> None:
        """All but the first `kept` tokens have been forgotten or replaced."""
        self.now += 1
        while self._kept and self._kept[-1][1] >= kept:
            self._kept.pop()
        self._kept.append((self.now, kept))

    def is_unchanged(self, since: int, tokens: int) -> bool:
        """Whether the first `tokens` tokens are what they were when `now` was `since`."""
        return all(kept >= tokens for change, kept in self._kept if change > since)
