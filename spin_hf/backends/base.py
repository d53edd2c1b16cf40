"""The interface of a backend: how the paged layers of one device compute a step.

    plan      host work of a step that has begun: tables, buffers, descriptors
    append    the step's tokens to their pages; may summarize the pages that they complete
    attend    each query to its sinks, its recent window and the pages that the method selects

    ReferenceBackend    PyTorch, any device                             `reference.py`
    StepKernels         Triton; after `plan` it only launches kernels   `triton_step.py`

`BackendSet` (`backend_set.py`) chooses one per layer. Attention to all tokens (prompts, given masks) does not depend on the
backend (`dense.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..state import LayerState
    from .attention_weights import AttentionWeights


@dataclass(frozen=True)
class Call:
    """Queries and softmax parameters of one attention call.

    Attributes:
        query: [B, H, G, Q, Dk], query heads grouped by KV head.
        scale: factor of the scores.
        softcap: scores become softcap * tanh(scores / softcap); None for no cap.
        sinks: [H * G], learned logits in the softmax's denominator; None for none.
        weights: collects attention weights; None if they are not returned.
    """

    query: Tensor
    scale: float
    softcap: float | None
    sinks: Tensor | None
    weights: AttentionWeights | None = None

    @property
    def is_plain(self) -> bool:
        """Whether torch's fused attention can compute it."""
        return self.softcap is None and self.sinks is None and self.weights is None

    def token(self, index: int) -> Call:
        """The call restricted to query token `index`."""
        return replace(self, query=self.query[:, :, :, index : index + 1])


def put(result: Tensor, out: Tensor) -> None:
    """Write [B, H, G, Q, Dv] to `out` [B, Q, heads, Dv]. Only inference mode may write to an inference tensor."""
    with torch.inference_mode(out.is_inference()):
        out.copy_(result.flatten(1, 2).transpose(1, 2))


class AttentionBackend(ABC):
    """Computes the steps of paged layers with one device and number of KV heads."""

    capturable: ClassVar[bool]
    """Whether a planned step only launches kernels, so that a CUDA graph can replay it."""

    @abstractmethod
    def plan(self, layer: LayerState, call: Call) -> None:
        """Do the host work for `call` in a layer: allocate what later steps of this shape need.

        Raises:
            CapacityError: memory ran out.
        """

    @abstractmethod
    def append(self, layer: LayerState, key: Tensor, value: Tensor) -> bool:
        """Write the step's tokens [B, H, n, D] to a layer's pages. Returns whether completed pages are summarized."""

    @abstractmethod
    def attend(self, layer: LayerState, call: Call, out: Tensor, new: tuple[Tensor, Tensor] | None = None) -> None:
        """Select pages for each query of the step and attend to them.

        Args:
            out: [B, Q, heads, Dv]; written.
            new: keys and values [B, H, 1, D] of a planned one-token step, to be appended; None if the step's tokens are in
                their pages already.
        """
