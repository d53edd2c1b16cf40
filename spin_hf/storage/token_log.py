"""Token ids that a cache holds, as far as its model was given ids.

    pieces    [0, 900)  [900, 901)  [901, 902) ...      each ids [U, n] and rows: sequence i has ids[rows[i]]

Tokens between pieces came as embeddings and are unknown. Selecting sequences changes rows only, so forks and beams copy no
ids. The cache keeps ids to notice a prompt that no longer begins with these tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

_MOST_PIECES = 256


class Piece(NamedTuple):
    """Consecutive tokens of all sequences.

    Attributes:
        first: position of the first token.
        stored: [U, n], ids.
        rows: of each sequence, its row of `stored`; None if sequence i has row i.
    """

    first: int
    stored: Tensor
    rows: tuple[int, ...] | None = None

    @property
    def stop(self) -> int:
        """Position behind the last token."""
        return self.first + self.stored.shape[1]

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return len(self.stored) if self.rows is None else len(self.rows)

    def ids(self, stop: int) -> Tensor:
        """Ids of the tokens before position `stop`: [B, stop - first], a view if the rows allow it."""
        ids, rows = self.stored[:, : stop - self.first], self.rows
        if rows is None:
            return ids
        return ids[rows[0] : rows[0] + 1].expand(len(rows), -1) if len(set(rows)) == 1 else ids[list(rows)]

    def selected(self, rows: Sequence[int]) -> Piece:
        """The piece whose sequence i is sequence rows[i] of this one."""
        return self._replace(rows=tuple(rows if self.rows is None else (self.rows[row] for row in rows)))


class TokenLog:
    """The ids of one cache's tokens. Immutable: changes return another object.

    Args:
        pieces: in order, without overlap.
    """

    def __init__(self, pieces: tuple[Piece, ...] = ()) -> None:
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
        return TokenLog((*held, Piece(start, ids)))

    def truncated(self, length: int) -> TokenLog:
        """Without the tokens from `length` on."""
        if not self.pieces or self.pieces[-1].stop <= length:
            return self
        held = (piece for piece in self.pieces if piece.first < length)
        return TokenLog(tuple(piece._replace(stored=piece.stored[:, : length - piece.first]) for piece in held))

    def selected(self, rows: Sequence[int]) -> TokenLog:
        """The log whose sequence i is sequence rows[i] of this one."""
        return TokenLog(tuple(piece.selected(rows) for piece in self.pieces))

    def ids(self, length: int) -> Tensor | None:
        """Ids [B, length], int64, of the first tokens; None if some are unknown."""
        return self.between(0, length)

    def between(self, first: int, stop: int) -> Tensor | None:
        """Ids [B, stop - first], int64, of the tokens [first, stop); None if some are unknown."""
        found, known = [], first
        for piece in self.pieces:
            if piece.first <= known < min(piece.stop, stop):
                found.append(piece.ids(stop)[:, known - piece.first :].long())
                known = min(piece.stop, stop)
        return torch.cat(found, 1) if found and known == stop else None

    def common_prefix(self, ids: Tensor, held: int, real: Tensor | None = None) -> int:
        """How many of the `held` tokens of a cache are the first ones of `ids` in every sequence. Unknown ones count as equal.

        Args:
            ids: [B, n], a whole prompt.
            real: [B, n], False for padding, which equals anything; None for none.
        """
        stop = min(held, ids.shape[1])
        for piece in self.pieces:
            first, last = piece.first, min(piece.stop, stop)
            if first >= last:
                continue
            if piece.batch_size != len(ids):  # an error, which the forward raises
                return stop
            differs = piece.ids(last).to(ids.device) != ids[:, first:last]
            if real is not None:
                differs &= real[:, first:last].to(ids.device).bool()
            columns = differs.any(0)
            if bool(columns.any()):
                return first + int(columns.int().argmax())
        return stop


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Join pieces that follow each other. Sequences that share ids go on sharing them."""
    joined: list[list[Piece]] = []
    for piece in pieces:
        own = (
            piece
            if piece.rows is None or len(piece.stored) < piece.batch_size
            else Piece(piece.first, piece.ids(piece.stop))
        )
        if joined and joined[-1][-1].stop == own.first and joined[-1][-1].rows == own.rows:
            joined[-1].append(own)
        else:
            joined.append([own])
    return [parts[0]._replace(stored=torch.cat([part.stored for part in parts], 1)) for parts in joined]
