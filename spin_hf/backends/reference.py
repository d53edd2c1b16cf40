"""The PyTorch backend: one query at a time, over its sinks, its recent window and the pages that the method selects.

    zones.py              fixed pages, candidates and budget of the query
    Method.select         selected pages
    PageStore.read        their keys and values, in waves that fit the page frames
    kernels.attend        attention over each wave; merged, with the estimate of unread pages

The result does not depend on the number of frames. It specifies the Triton backend.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..attention.methods.base import Estimate, Method, Query
from ..indexing.fit import fitted_of
from ..storage.page_store import PageStore
from .base import AttentionBackend, Call, put
from .dense import attend_held, attend_in_waves
from .zones import StepPlan

if TYPE_CHECKING:
    from ..state import CacheState, LayerState

logger = logging.getLogger("spin_hf")


class ReferenceBackend(AttentionBackend):
    """The PyTorch backend of a cache.

    Args:
        state: the cache's state.
        zones: plans of the step's queries.
    """

    capturable = False

    def __init__(self, state: CacheState, zones: StepPlan) -> None:
        self.state = state
        self.zones = zones

    def plan(self, layer: LayerState, call: Call) -> None:
        """Nothing: PyTorch allocates as it goes."""

    def append(self, layer: LayerState, key: Tensor, value: Tensor) -> bool:
        """Write the step's tokens [B, H, n, D] to a layer's pages."""
        assert layer.store is not None
        layer.store.append(key, value)
        return False

    def attend(self, layer: LayerState, call: Call, out: Tensor, new: tuple[Tensor, Tensor] | None = None) -> None:
        """Attend with each query, the last Q tokens held, to the pages selected for it; `out` [B, Q, heads, Dv]."""
        store, num_queries = layer.store, call.query.shape[3]
        assert store is not None
        if self.zones.attends_all():
            mask = self.zones.allowed_all(num_queries, call.query.device)
            put(attend_held(call, mask, store), out)
            return
        first = store.sequences.length - num_queries
        for i in range(num_queries):
            put(self.attend_selected(layer, call.token(i), first + i), out[:, i : i + 1])

    def attend_selected(self, layer: LayerState, call: Call, position: int) -> Tensor:
        """Sparse attention of one query per sequence, at `position`: [B, H, G, 1, Dv]."""
        state, store, zones = self.state, layer.store, self.zones
        assert store is not None
        pages = select_pages(call, position, layer, zones, state.method)
        allowed = zones.allowed(pages, position)
        layer.attended_tokens += int(allowed.sum())
        layer.attended_queries += allowed.shape[0] * allowed.shape[1]
        if store.frames is not None and pages.shape[2] > store.frames.num_slots and not state.warned_waves:
            state.warned_waves = True
            logger.warning(_WAVES, store.frames.num_slots, pages.shape[2])
        rest = estimate_rest(call, position, layer, zones, state.method, pages)
        return attend_in_waves(call, store.read(pages), allowed[:, :, None, None], store.page_size, rest, pages)


_WAVES = (
    "gpu_memory holds %d of the %d pages that a step reads per KV head, so all are loaded again at every step; "
    "raise gpu_memory or lower budget"
)


def select_pages(call: Call, position: int, layer: LayerState, plan: StepPlan, method: Method) -> Tensor:
    """Pages that the single query of `call`, at `position`, attends to in a layer: [B, H, n], int64, -1 for none.

    The plan's fixed pages come first, then the selected ones.
    """
    query, fixed = _query(call, position, layer, plan, method)
    store = held_store(layer)
    selected = method.select(query, partial(_summary, store, query))
    return torch.cat([fixed.unsqueeze(1).expand(-1, store.num_heads, -1), selected], 2)


def estimate_rest(
    call: Call, position: int, layer: LayerState, plan: StepPlan, method: Method, pages: Tensor
) -> Estimate | None:  # fmt: skip
    """The method's estimate of the pages that are not in `pages`, the result of `select_pages`; None if it makes none."""
    if type(method).estimate is Method.estimate:
        return None
    query, fixed = _query(call, position, layer, plan, method)
    return method.estimate(query, partial(_summary, held_store(layer), query), pages[:, :, fixed.shape[1] :])


def held_store(layer: LayerState) -> PageStore:
    """The pages of a layer that has some."""
    assert layer.store is not None
    return layer.store


def _query(call: Call, position: int, layer: LayerState, plan: StepPlan, method: Method) -> tuple[Query, Tensor]:
    """The method's input, and the fixed pages [B, F]."""
    zones = plan.query(position, call.query.device)
    query = Query(
        states=call.query.squeeze(3).float(), candidates=zones.candidates, budget_tokens=zones.budget_tokens,
        page_size=method.page_size, scale=call.scale, layer=layer.number, page_tokens=zones.page_tokens,
        positions=zones.positions, fitted=fitted_of([layer], method), softcap=call.softcap,
    )  # fmt: skip
    return query, zones.fixed


def _summary(store: PageStore, query: Query, name: str, pages: Tensor | None = None) -> Tensor:
    summary = store.summary(name, pages)
    summary = summary[:, :, : query.candidates.shape[1]] if pages is None else summary
    return summary.float() if summary.is_floating_point() else summary
