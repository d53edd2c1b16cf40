"""Memory that one sequence needs, for admission to a batch that sequences join and leave.

    mandatory    summaries, tables, and the page frames of one step: without them no step runs
    minimum      mandatory, and `BUFFER_FACTOR` times its page frames for pages of later steps; all pages if that is less
    resident     all pages in the compute tier

As `plan`, from budgets of the layers (`memory/layer_budget.py`), but without a cap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..attention.methods.base import Method
from ..config import SpinOptions
from ..integration.layer_types import build_layers, decoder_config
from ..storage.page_table import SEGMENT_PAGES, segments_of
from ..storage.tier_budget import TierBudget
from .layer_budget import layer_shapes, tier_budget

BUFFER_FACTOR = 5
"""Page frames for later steps, in multiples of those of one step (SPIN: more gives little)."""


@dataclass(frozen=True)
class RequestNeeds:
    """Bytes of one sequence, as described at the head of this file.

    Attributes:
        mandatory, minimum, resident: in the compute tier.
        host: in the cpu tier, where not all pages are in the compute tier.
    """

    mandatory: int
    minimum: int
    resident: int
    host: int


class NeedsByLength:
    """Needs of sequences of any length.

    Args:
        model: the model.
        method, options: of their caches; the method is bound to the model.
    """

    def __init__(self, model: Any, method: Method, options: SpinOptions) -> None:
        config, _ = decoder_config(model)
        layers: list[int] = []
        build_layers(config, layers.append)
        shapes = layer_shapes(config, layers) or []
        device, dtype = torch.device(model.device), model.dtype
        self._page_size = method.page_size
        self._budgets: list[TierBudget] = [
            tier_budget(shape, dtype, method, options, None, len(layers), device) for shape in shapes
        ]

    def of(self, num_tokens: int) -> RequestNeeds:
        """Needs of a sequence of `num_tokens` tokens; zeros where the config does not tell the shapes of the layers."""
        pages = -(-num_tokens // self._page_size)
        room = 1, segments_of(pages), segments_of(pages) * SEGMENT_PAGES
        mandatory = minimum = resident = host = 0
        for budget in self._budgets:
            step = budget.step_frames(pages)
            buffered = min(room[2], (1 + BUFFER_FACTOR) * step)
            mandatory += budget.bytes_with(step, *room) // budget.num_layers
            minimum += budget.bytes_with(buffered, *room) // budget.num_layers
            resident += budget.resident_bytes(*room[:2]) // budget.num_layers
            host += budget.host_bytes(room[1]) // budget.num_layers
        return RequestNeeds(min(mandatory, resident), min(minimum, resident), resident, host)
