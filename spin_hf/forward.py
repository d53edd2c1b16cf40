"""The present forward: what it has changed so far, and how to take that back if it does not reach the last layer.

    update(0) ... update(k)   error, Ctrl-C      the next forward begins with `settle`:
    └── changed so far ──┘                         paged layers       are cut back to the committed length
                                                   attention layers   get back the tensors they had
                                                   linear attention   is overwritten in place: refused until `reset`

The tensors of attention layers are kept by reference: transformers replaces them and does not write into them.
So a forward either happens to the whole cache or not at all. While Dynamo traces nothing is logged; there the last
paged layer commits.
"""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from .errors import CacheStateError
from .layer import SpinLayer
from .layer_kinds import is_placeholder
from .shared import SharedState


class ForwardLog:
    """Changes of the forward in progress.

    Args:
        layers: the cache's layers.
        shared: state of the paged ones.
    """

    def __init__(self, layers: list[Any], shared: SharedState) -> None:
        self.shared = shared
        holding = [index for index, layer in enumerate(layers) if not is_placeholder(layer)]
        self.final = holding[-1] if holding else -1
        """The last layer that holds anything; when it has taken the tokens, the forward is committed."""
        self.last = -1
        self.before: dict[int, dict[str, Any]] = {}
        self.irreversible = False

    def touch(self, index: int, layers: list[Any]) -> None:
        """Note that layer `index` is about to change; a layer that comes round again begins a new forward."""
        layer = layers[index]
        linear = isinstance(layer, LinearAttentionCacheLayerMixin)
        if index < self.last or (index == self.last and not linear):
            self.settle(layers)
        self.last = index
        self.shared.commits_with_last_paged = isinstance(layers[self.final], SpinLayer)
        if linear:
            self.irreversible = True
        elif isinstance(layer, DynamicLayer) and index not in self.before:
            self.before[index] = dict(layer.__dict__)

    def touched(self, index: int, layers: list[Any]) -> None:
        """Note that layer `index` has changed; a final layer that is not paged commits the forward."""
        if index == self.final and not isinstance(layers[index], SpinLayer) and not self.shared.prepared:
            self.shared.commit()
            self.clear()

    def settle(self, layers: list[Any]) -> None:
        """Take back a forward that did not reach the last layer.

        Raises:
            CacheStateError: it cannot be taken back.
        """
        self.shared.settle()
        if self.last < 0:
            return
        if (
            self.last == self.final
            and self.shared.committed == self.shared.sequences.length
            and not self.shared.pending
        ):
            self.clear()
            return
        if self.irreversible:
            raise CacheStateError(
                f"a forward of {self.shared.model_name} was interrupted after it had overwritten the state of "
                "linear-attention layers, expected it to reach the last layer; call cache.reset() and start anew"
            )
        for index, attributes in self.before.items():
            layers[index].__dict__.clear()
            layers[index].__dict__.update(attributes)
        lost = self.shared.pending
        self.shared.roll_back()
        self.clear()
        self.shared.pending = lost
        self.shared.check_nothing_pending()

    def clear(self) -> None:
        """Nothing is in progress."""
        self.last, self.before, self.irreversible = -1, {}, False
        self.shared.commits_with_last_paged = True
