"""The launches that select the pages of one query of a step, by the recipe of the method, in their order.

    kernel_queries   of a method that makes its own                               -> one query for each KV head
    score_pages      products with one vector of every candidate, or with a box   -> logits
    bin_scores       scores of the candidates                                     -> histogram of scores
    rerank_pages     with `looked_at`: the best again, by keys in four bits       -> histogram of new scores
    select_pages     the best up to the budget, and their page frames             -> list of pages

The specification is the method's `select`; `tests/backends` holds both against each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..attention.methods.base import Method
from ..kernels.descriptor_fields import PlanField

if TYPE_CHECKING:
    from ..kernels.launch import Launch, LaunchShape
    from ..state import LayerState
    from .triton_step import StepKernels


class Selection:
    """Selects for one cache on one device. Args: step: the kernels it belongs to."""

    def __init__(self, step: StepKernels) -> None:
        self.step = step
        self.placed_by: dict[int, Method] = {}
        """Whose tensors launches for a layer read: they live as long as these launches."""

    def place(self, layer: LayerState) -> tuple[Tensor, ...]:
        """Tensors of the method that launches for a layer read, on the device from here on."""
        method = self.step.shared.method
        tensors = method.kernel_tensors(layer.number, self.step.device)
        self.placed_by[layer.number] = method
        return tensors

    def select(
        self, launch: Launch, layer: LayerState, plan: Tensor, query: Tensor, index: int, scale: float,
        new: tuple[Tensor, Tensor] | None, shape: LaunchShape,
    ) -> None:  # fmt: skip
        """List the pages of query `index` [B, heads, 1, Dk] of the step, and assign slots to those that are missing.

        Args:
            plan: int32 [B, len(PlanField)], of this query.
            new: as for `StepKernels.attend`.
        """
        step, launchers, recipe = self.step, self.step.launchers, self.step.recipe
        buffers, own = step.buffers, step.layer_buffers[layer.number]
        if recipe.asks:
            states, positions = query.unflatten(1, (step.num_heads, -1)).squeeze(3), plan[:, PlanField.OWN_POSITION]
            query = step.shared.method.kernel_queries(states, positions, layer.number).contiguous()
            scale = 1.0
        group = query.shape[1] // step.num_heads
        launchers.score_pages(launch, buffers, own, plan, query, new, scale=scale, recipe=recipe, shape=shape)
        launchers.bin_scores(launch, buffers, own, plan, query, scale=scale, recipe=recipe, shape=shape)
        if recipe.looked_at:
            launchers.rerank_pages(launch, buffers, own, plan, group=group, recipe=recipe, shape=shape)
        launchers.select_pages(
            launch, buffers, own, plan, query_index=index, group=group, most_listed=step.most_pages(), recipe=recipe,
            shape=shape,
        )  # fmt: skip
