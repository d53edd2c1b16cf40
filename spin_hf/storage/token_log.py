"""Token ids that a cache holds, as far as its model was given ids.

    pieces    [0, 900)  [900, 901)  [901, 902) ...      each [B, n]; tokens between pieces came as embeddings and are unknown

The cache keeps them to notice a prompt that no longer begins with these tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

_MOST_PIECES = 256


class TokenLog:
    """The ids of one cache's tokens. Immutable: changes return another object.

    Args:
        pieces: position of the first token, and ids [B, n], of each piece.
    """

    def __init__(self, pieces: tuple[tuple[int, Tensor], ...] = ()) -> None:
        self.pieces = pieces

    def recorded(self, start: int, ids: Tensor | None) -> TokenLog:
        """With tokens `ids` [B, n] from position `start` on, in place of what stood there; None if they are unknown.

        `ids` is kept, not copied. Called at every decode step: unless tokens are replaced, the pieces before are not looked at.
        """
        held = self.truncated(start).pieces
        if ids is None:
            return TokenLog(held)
        if len(held) >= _MOST_PIECES:
            with suppress(RuntimeError):  # out of memory: joined by a later call
                held = tuple(_joined(held))
        return TokenLog((*held, (start, ids)))

    def truncated(self, length: int) -> TokenLog:
        """Without the tokens from `length` on."""
        if not self.pieces or self.pieces[-1][0] + self.pieces[-1][1].shape[1] <= length:
            return self
        return TokenLog(tuple((first, piece[:, : length - first]) for first, piece in self.pieces if first < length))

    def selected(self, rows: list[int]) -> TokenLog:
        """The log whose sequence i is sequence rows[i] of this one."""
        return TokenLog(tuple((first, piece[rows]) for first, piece in self.pieces))

    def ids(self, length: int) -> Tensor | None:
        """Ids [B, length] of the first tokens; None if some are unknown."""
        joined = _joined(self.pieces)
        if len(joined) != 1 or joined[0][0] or joined[0][1].shape[1] < length:
            return None
        return joined[0][1][:, :length]

    def common_prefix(self, ids: Tensor, held: int, real: Tensor | None = None) -> int:
        """How many of the `held` tokens of a cache are the first ones of `ids` in every sequence. Unknown ones count as equal.

        Args:
            ids: [B, n], a whole prompt.
            real: [B, n], False for padding, which equals anything; None for none.
        """
        stop = min(held, ids.shape[1])
        for first, piece in self.pieces:
            last = min(first + piece.shape[1], stop)
            if first >= last:
                continue
            if len(piece) != len(ids):  # an error, which the forward raises
                return stop
            differs = piece[:, : last - first].to(ids.device) != ids[:, first:last]
            if real is not None:
                differs &= real[:, first:last].to(ids.device).bool()
            columns = differs.any(0)
            if bool(columns.any()):
                return first + int(columns.int().argmax())
        return stop


def _joined(pieces: Sequence[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
    """Join pieces that follow each other."""
    joined: list[tuple[int, list[Tensor]]] = []
    stop = -1
    for first, piece in pieces:
        if first == stop:
            joined[-1][1].append(piece)
        else:
            joined.append((first, [piece]))
        stop = first + piece.shape[1]
    return [(first, torch.cat(parts, 1)) for first, parts in joined]
