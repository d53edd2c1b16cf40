"""What one step may attend to: fixed pages, candidates and budget of every query. Computed once, used by all layers.

    tokens   0 ........................................ t        t: the query's own position
    pages   [sinks][    candidates: the method's choice    ][recent window, partly filled page]
             fixed                                            fixed

Zones count valid tokens and cover whole pages. They depend on the position of the query alone, never on how tokens were
grouped into calls: a token decoded in a step of its own, verified among others, or replayed after a crop has the same.
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
        candidates: [B, N], bool: pages a method may select.
        budget_tokens: [B], int64: how many tokens it may select per KV head.
        positions: [B], int64: real tokens before the query; None where no method asks for it.
        page_tokens: [B, N], int64: tokens of each page that are no padding and not after the query.
    """

    fixed: Tensor
    candidates: Tensor
    budget_tokens: Tensor
    positions: Tensor | None
    page_tokens: Tensor


class StepPlan:
    """Plans of the present step's queries, made on demand.

    Args:
        options: budget, sinks, window.
        sequences: the batch.
    """

    def __init__(self, options: SpinOptions, sequences: PageTable) -> None:
        self.options = options
        self.sequences = sequences
        self._step = -1
        self._plans: dict[tuple[int, torch.device], QueryPlan] = {}

    def forget(self) -> None:
        """Drop the plans of a step that was taken back."""
        self._plans = {}

    def attends_all(self) -> bool:
        """Whether no query of the step leaves any token out, whatever the padding."""
        budget, length = self.options.budget, self.sequences.length
        if length <= self.options.dense_below:
            return True
        return budget >= length if isinstance(budget, int) else budget >= 1.0

    def query(self, position: int, device: torch.device) -> QueryPlan:
        """The plan of the query at `position`."""
        if self._step != self.sequences.step:
            self._step, self._plans = self.sequences.step, {}
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
        everything = held <= budget.clamp(min=options.dense_below)  # holes: few tokens may lie on many pages
        budget = torch.where(everything, num_pages * seq.page_size, budget)
        stands = seq.positions(position, position + 1, device)[:, 0] if seq.mask.keeps_positions else None
        return QueryPlan(kernels.list_pages(fixed), candidates, budget, stands, per_page)

    def allowed(self, pages: Tensor, position: int) -> Tensor:
        """Which tokens of `pages` [B, H, n] (-1 for none) a query at `position` may attend to: [B, H, n * P], bool.

        Clustered pages hold other tokens than their place says, but like those none is padding or after the query.
        """
        page_size, valid = self.sequences.page_size, self.sequences.mask.valid
        tokens = pages.unsqueeze(-1) * page_size + torch.arange(page_size, device=pages.device)
        allowed = (tokens >= 0) & (tokens <= position)
        if valid is not None:
            rows = torch.arange(pages.shape[0], device=pages.device).view(-1, 1, 1, 1)
            allowed &= valid.to(pages.device)[rows, tokens.clamp(0, valid.shape[1] - 1)]
        return allowed.flatten(2)

    def allowed_all(self, num_queries: int, device: torch.device) -> Tensor:
        """Causal mask over all tokens held, for the last `num_queries` of them: [B, 1, Q, tokens], bool.

        It holds for tokens in the order of the pages too: clustered ones are before all these queries, and no padding.
        """
        seq = self.sequences
        tokens = torch.arange(seq.length, device=device)
        causal = tokens <= tokens[seq.length - num_queries :].unsqueeze(1)
        if seq.mask.valid is None:
            return causal.expand(seq.batch_size, 1, -1, -1)
        return causal & seq.mask.valid.to(device)[:, None, None, :]
