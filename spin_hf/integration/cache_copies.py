"""Copies of a cache.

    copy.copy        both objects are the same cache
    fork             shares pages until one side writes
    copy.deepcopy    shares nothing, also not with the forks of the original

They belong to the same model, and have the same options and caps.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, TypeVar

from ..errors import OptionTypeError
from ..inference_mode import outside_inference_mode
from .batch_indices import times_of
from .forked_states import fork_states
from .rank_agreement import meeting

Copied = TypeVar("Copied", bound="CacheCopies")

_BOUND = ("_config", "_copied", "_finalizer", "calls")
"""Attributes that belong to one cache object and its model."""


class CacheCopies:
    """The methods of `SpinCache` that copy it."""

    _state: Any
    _passes: Any
    _log: Any
    _bind: Any
    _config: Any
    layers: Any
    calls: Any
    _finalizer: Any
    batch_repeat_interleave: Any

    @outside_inference_mode
    def fork(self: Copied, num_sequences: int | None = None) -> Copied:
        """An independent cache of the same model with the same tokens, which shares pages until one side writes them.

        Only windows and states of linear attention are copied now. A side that writes to a page first copies the segment that
        it lies in, of 32 pages per KV head. Forks may be forked. A fork has no page frames until its first step; it then loads
        pages on demand. `copy.deepcopy` copies all pages instead.

        Tokens that the next step would cluster or summarize first are clustered and summarized now. An interrupted forward is
        rolled back first.

        Args:
            num_sequences: copies of each sequence, side by side, as `batch_repeat_interleave` makes them. 8 is for eight
                questions about one document; None is 1.
        Raises:
            OptionTypeError, OptionError: `num_sequences` is not a number of 1 or more.
            BudgetError, CapacityError: that many sequences do not fit the caps. Nothing has changed.
        """
        times = 1 if num_sequences is None else times_of(num_sequences, "num_sequences")
        twin = self._forked(object.__new__(type(self)))
        if times > 1:
            twin.batch_repeat_interleave(times)
        return twin

    @outside_inference_mode
    def fork_into(self: Copied, other: Copied) -> None:
        """Make the empty cache `other`, of the same model and with the same options, a fork of this one."""
        self._forked(other)

    def _forked(self: Copied, twin: Copied) -> Copied:
        """Make `twin`, an object without contents or an empty cache, a fork of this cache."""
        self._log.settle(self.layers)
        with meeting(self._state.ranks, "fork"):
            memo = self._passes.fork()
        fork_states(self.layers, memo)
        if "_finalizer" in twin.__dict__:
            twin._finalizer()  # frees its memory, and unhooks its model
        self._copied_with(memo, twin)
        twin._passes.attach(self._state.sequences, memo)
        return twin

    def __copy__(self: Copied) -> Copied:
        """A shallow copy, as for transformers' caches: both objects share one state."""
        twin = object.__new__(type(self))
        # The original, and so the finalizer, lives as long as its copy.
        twin.__dict__.update(self.__dict__, _copied=self)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise OptionTypeError(
            "a SpinCache belongs to a model of this process, expected no pickle of it; pickle DynamicCache(iter(cache)) and "
            "take that over with SpinCache.from_cache"
        )

    @outside_inference_mode
    def __deepcopy__(self: Copied, memo: dict[int, Any]) -> Copied:
        """An independent cache of the same model with the same tokens, for reusing a prefix. It shares nothing."""
        self._log.settle(self.layers)
        self._passes.gpu.before_copy()
        return self._copied_with(memo, object.__new__(type(self)))

    def _copied_with(self: Copied, memo: dict[int, Any], twin: Copied) -> Copied:
        """Make `twin` a deep copy, of all that is not in `memo`."""
        memo[id(self)] = twin
        for name, attribute in self.__dict__.items():
            if name not in _BOUND:
                setattr(twin, name, deepcopy(attribute, memo))
        twin._bind(self._config, self.calls.model(), self.calls)
        return twin
