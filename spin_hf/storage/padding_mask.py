"""Padding mask of the tokens held.

    valid   row 0  [ . . x x x x x x x . . x x ]      . padding (left, or a hole from an earlier turn)
            row 1  [ x x x x x x x x x x x x x ]      x real token

Padding is stored as one bit per token, not as a length: a sequence that finished early and continues in a later turn has
padding in the middle. Without any padding nothing is stored (`valid` is None) and nothing is computed.

    positions   row 0  [ 0 0 0 1 2 3 4 5 6 6 6 7 8 ]      real tokens before each token when it was appended

Some methods need the RoPE position of a key. It is fixed when the token is appended. A later mask does not change it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenMask:
    """Immutable validity of tokens. Every change returns a new object.

    Attributes:
        keeps_positions: whether to store `positions`.
        valid: [B, length], bool, False for padding; None while all tokens are valid.
        positions: [B, length], int64, undefined for padding; None while token i is at position i.
    """

    keeps_positions: bool = False
    valid: Tensor | None = None
    positions: Tensor | None = None

    @property
    def metadata(self) -> dict[str, int]:
        """Bytes stored, by name."""
        held = {"padding": self.valid, "token positions": self.positions}
        return {name: 0 if table is None else table.nbytes for name, table in held.items()}

    def appended(self, batch_size: int, start: int, new: Tensor | None, count: int) -> TokenMask:
        """The mask with tokens [start, start + count) appended.

        Args:
            new: their validity, [B, count], bool; None for all valid.
        """
        unpadded = self.valid is None and (new is None or bool(new.all()))
        if unpadded and self.positions is None:
            return self
        if unpadded:
            assert self.positions is not None
            return replace(self, positions=self._with_positions(start, self.positions.new_ones((batch_size, count))))
        held = self.valid
        if held is None:
            assert new is not None
            held = torch.ones((batch_size, start), dtype=torch.bool, device=new.device)
        fresh = held.new_ones((batch_size, count)) if new is None else new.to(held.device)
        positions = self._with_positions(start, fresh) if self.keeps_positions else None
        return replace(self, valid=torch.cat([held[:, :start], fresh], dim=1), positions=positions)

    def next_positions(self, start: int, fresh: Tensor) -> Tensor:
        """Positions [B, count] of tokens with validity `fresh` [B, count] if appended at `start`; undefined for padding."""
        held = start if self.valid is None else self.valid[:, :start].to(fresh.device).sum(1, keepdim=True)
        return (held + fresh.long().cumsum(1) - 1).clamp(min=0)

    def _with_positions(self, start: int, fresh: Tensor) -> Tensor:
        held = torch.arange(start).expand(len(fresh), -1) if self.positions is None else self.positions[:, :start]
        return torch.cat([held.to(fresh.device), self.next_positions(start, fresh)], dim=1)

    def changed_tokens(self, mask: Tensor | None, length: int) -> Tensor | None:
        """[B, length], bool: where validity differs from `mask` [B, >= length] (None: all valid). None if nowhere."""
        if self.valid is None and (mask is None or bool(mask[:, :length].all())):
            return None
        held = self.valid[:, :length] if self.valid is not None else torch.ones_like(mask[:, :length])  # type: ignore[index]
        wanted = torch.ones_like(held) if mask is None else mask[:, :length].to(held.device)
        changed = held != wanted
        return changed if bool(changed.any()) else None

    def replaced(self, mask: Tensor | None, length: int) -> TokenMask:
        """The mask with the first `length` columns of `mask` [B, >= length] (None: all valid) as validity; same positions."""
        valid = None if mask is None or bool(mask[:, :length].all()) else mask[:, :length].clone()
        return replace(self, valid=valid)

    def truncate(self, length: int) -> TokenMask:
        """The mask of the first `length` tokens."""
        return self._changed(lambda table: table[:, :length] if length else None)

    def selected(self, rows: Tensor) -> TokenMask:
        """The mask whose row i is row `rows[i]` of this one."""
        return self._changed(lambda table: table.index_select(0, rows.to(table.device)))

    def _changed(self, change: Callable[[Tensor], Tensor | None]) -> TokenMask:
        """The mask with `change` applied to both tables, if they are stored."""
        valid, positions = (None if table is None else change(table) for table in (self.valid, self.positions))
        return replace(self, valid=valid, positions=positions)
