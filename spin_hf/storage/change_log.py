"""Log of changes to the past. Answers whether the first n tokens of a batch are unchanged since an earlier version.

    change      1: first 40 valid    4: first 12 valid    5: first 30 valid      a crop leaves a prefix, a reset leaves nothing
    unchanged   since 0: 12          since 4: 30          since 5: all

A change is dropped from the log once a later change leaves a prefix of the same length or a shorter one.
"""

from __future__ import annotations


class Past:
    """Log of changes to tokens held."""

    def __init__(self) -> None:
        self.now = 0
        """Number of changes so far: the current version."""
        self._changes: list[tuple[int, int]] = []
        """(version, length of the unchanged prefix), both ascending."""

    def change(self, prefix: int) -> None:
        """Log that all tokens but the first `prefix` were dropped or replaced."""
        self.now += 1
        while self._changes and self._changes[-1][1] >= prefix:
            self._changes.pop()
        self._changes.append((self.now, prefix))

    def is_unchanged(self, since: int, tokens: int) -> bool:
        """Whether the first `tokens` tokens are unchanged since `now` was `since`."""
        return all(prefix >= tokens for version, prefix in self._changes if version > since)
