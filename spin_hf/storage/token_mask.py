"""Which tokens of each sequence are real and which are padding.

    valid   row 0  [ . . x x x x x x x . . x x ]      . padding (left, or a hole from an earlier turn)
            row 1  [ x x x x x x x x x x x x x ]      x a real token

Padding is a bit per token and no length: a batch that finished early and goes on has holes in the middle. While no
padding was ever seen nothing is stored (`valid` is None) and nothing is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor


class TokenMask:
    """Validity of tokens [B, length]; None while all of them are valid."""

    def __init__(self) -> None:
        self.valid: Tensor | None = None

    def append(self, batch_size: int, start: int, new: Tensor | None, count: int) -> None:
        """Set the validity of tokens [start, start + count).

        Args:
            new: [B, count], bool, or None for all valid.
        """
        if self.valid is None:
            if new is None or bool(new.all()):
                return
            self.valid = torch.ones((batch_size, start), dtype=torch.bool, device=new.device)
        fresh = self.valid.new_ones((batch_size, count)) if new is None else new.to(self.valid.device)
        self.valid = torch.cat([self.valid[:, :start], fresh], dim=1)

    def changed_tokens(self, mask: Tensor | None, length: int) -> Tensor | None:
        """Tokens [B, length] whose validity differs from `mask` [B, >= length] (None: all valid); None if none does."""
        if self.valid is None and (mask is None or bool(mask[:, :length].all())):
            return None
        held = self.valid[:, :length] if self.valid is not None else torch.ones_like(mask[:, :length])  # type: ignore[index]
        wanted = torch.ones_like(held) if mask is None else mask[:, :length].to(held.device)
        changed = held != wanted
        return changed if bool(changed.any()) else None

    def replace(self, mask: Tensor | None, length: int) -> None:
        """Take `mask` [B, >= length] (None: all valid) as the validity of the first `length` tokens."""
        self.valid = None if mask is None or bool(mask[:, :length].all()) else mask[:, :length].clone()

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        if self.valid is not None:
            self.valid = self.valid[:, :length] if length else None

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was."""
        if self.valid is not None:
            self.valid = self.valid.index_select(0, rows.to(self.valid.device))
