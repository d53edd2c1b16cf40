"""Fixed pages, candidates and budget of each query of a step. Computed once, used by all layers.

    tokens   0 ........................................ t        t: the query's own position
    pages   [sinks][     candidates for the method     ][recent window, partly filled page]
             fixed                                        fixed

Zones count valid tokens and cover whole pages. They depend only on the query's position, not on how tokens were batched
into calls. Decoding, verification of several tokens and repetition after a crop give a token the same zones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..config import SpinOptions
from ..storage.page_table import PageTable


@dataclass(frozen=True)
class QueryPlan:
    """Pages of one query position in every sequence.

    Attributes:
        fixed: [B, F], int64: pages always attended to; -1 for none.
        candidates: [B, N], bool: pages that the method may select.
        budget_tokens: [B], int64: tokens that it may select per KV head.
        positions: [B], int64: real tokens before the query; None if the method does not use positions.
        page_tokens: [B, N], int64: tokens of each page up to the query, without padding.
    """

    fixed: Tensor
    candidates: Tensor
    budget_tokens: Tensor
    positions: Tensor | None
    page_tokens: Tensor


class StepPlan:
    """Plans of the current step's queries, made on demand.

    Args:
        options: budget, sinks, window.
        sequences: page table of the batch.
    """

    def __init__(self, options: SpinOptions, sequences: PageTable) -> None:
        self.options = options
        self.sequences = sequences
        self._step = -1
        self._plans: dict[tuple[int, torch.device], QueryPlan] = {}
        self._real: dict[tuple[int, int, torch.device], list[Tensor | None] | None] = {}

    def forget(self) -> None:
        """Drop the plans of a step that was rolled back."""
        self._plans, self._real = {}, {}

    def attends_all(self) -> bool:
        """Whether every query of the step attends to all earlier tokens, regardless of padding."""
        return self.covers(self.sequences.length)

    def covers(self, length: int) -> bool:
        """Whether the budget covers `length` tokens."""
        budget = self.options.budget
        if length <= self.options.dense_tokens:
            return True
        return budget >= length if isinstance(budget, int) else budget >= 1.0

    def query(self, position: int, device: torch.device) -> QueryPlan:
        """The plan of the query at `position`."""
        self._follow_step()
        plan = self._plans.get((position, device))
        if plan is None:
            plan = self._plans[position, device] = self._make(position, device)
        return plan

    def _make(self, position: int, device: torch.device) -> QueryPlan:
        seq, options = self.sequences, self.options
        num_pages = position // seq.page_size + 1
        valid = torch.zeros((seq.batch_size, num_pages * seq.page_size), dtype=torch.bool, device=device)
        valid[:, : position + 1] = True if seq.mask.valid is None else seq.mask.valid[:, : position + 1].to(device)
        per_page = valid.view(seq.batch_size, num_pages, seq.page_size).sum(2)
        fixed, candidates = kernels.page_zones(per_page, options.num_sink_tokens, options.recent_window)
        held = per_page.sum(1)
        if isinstance(options.budget, int):
            budget = torch.full_like(held, options.budget)
        else:
            budget = (held.double() * options.budget - 1e-9).ceil().long()  # 0.3 of 400 is 120, not 121
        everything = held <= budget.clamp(min=options.dense_tokens)  # padding may spread few tokens over many pages
        budget = torch.where(everything, num_pages * seq.page_size, budget)
        positions = seq.positions(position, position + 1, device)[:, 0] if seq.mask.keeps_positions else None
        return QueryPlan(kernels.list_pages(fixed), candidates, budget, positions, per_page)

    def allowed(self, pages: Tensor, position: int) -> Tensor:
        """Which tokens of `pages` [B, H, n] (-1 for none) a query at `position` may attend to: [B, H, n * P], bool.

        Clustered pages hold permuted tokens. The result holds for them too: none is padding or after the query.
        """
        page_size, valid = self.sequences.page_size, self.sequences.mask.valid
        tokens = pages.unsqueeze(-1) * page_size + torch.arange(page_size, device=pages.device)
        allowed = (tokens >= 0) & (tokens <= position)
        if valid is not None:
            rows = torch.arange(pages.shape[0], device=pages.device).view(-1, 1, 1, 1)
            allowed &= valid.to(pages.device)[rows, tokens.clamp(0, valid.shape[1] - 1)]
        return allowed.flatten(2)

    def real_tokens(self, first: int, stop: int, device: torch.device) -> list[Tensor | None] | None:
        """Which of the tokens [first, stop) are no padding: None if all are, else for each sequence their indices or None.

        Indices count from `first`, int64, on `device`. Computed once a step, as it waits for the device. Valid in page order
        too, as for `allowed_all`.
        """
        valid = self.sequences.mask.valid
        if valid is None:
            return None
        self._follow_step()
        key = first, stop, device
        if key not in self._real:
            rows = valid[:, first:stop].cpu()
            found = [None if bool(row.all()) else row.nonzero().squeeze(1).to(device) for row in rows]
            self._real[key] = None if all(tokens is None for tokens in found) else found
        return self._real[key]

    def _follow_step(self) -> None:
        if self._step != self.sequences.step:
            self.forget()
            self._step = self.sequences.step

    def allowed_all(self, num_queries: int, device: torch.device) -> Tensor:
        """Causal mask over all tokens held, for the last `num_queries` of them: [B, 1, Q, tokens], bool.

        Valid in page order too: clustered tokens precede all these queries and are not padding.
        """
        seq = self.sequences
        tokens = torch.arange(seq.length, device=device)
        causal = tokens <= tokens[seq.length - num_queries :].unsqueeze(1)
        if seq.mask.valid is None:
            return causal.expand(seq.batch_size, 1, -1, -1)
        return causal & seq.mask.valid.to(device)[:, None, None, :]
