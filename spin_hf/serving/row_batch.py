"""Decode steps over several caches of one sequence each, which join and leave a running batch.

    rows     0: cache A, 1200 tokens     1: empty     2: cache B, 70 tokens     3: cache C, 31000 tokens
    step     {0: id, 2: id}  ->  one forward of the model with two sequences of one token  ->  logits [2, vocab]

Pages are not copied: in the attention of a paged layer each sequence of the forward appends to and attends to the pages of its
own cache. A step counts in all of its rows or in none.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import implementation
from ..backends.row_kernels import sizes_up_to
from ..cache import SpinCache
from ..config import require_count
from ..errors import CacheStateError, OptionError, OptionTypeError, UnsupportedModelError
from ..graph.eligibility import fixed_arguments
from ..graph.model_calls import may_be_captured, model_of
from ..graph.runner import warn_eager
from ..inference_mode import outside_inference_mode
from ..integration.forward_hook import CACHE_NAMES
from ..integration.tensor_parallel import ranks_of
from .row import Row, check_alike, check_cache
from .row_errors import blaming
from .row_steps import RowSteps
from .row_views import RowsView


class RowBatch:
    """Decodes one token for each of up to `max_rows` caches of one sequence.

    A cache is used by nobody else while it is a row. The batch is used by one thread at a time.

    Args:
        model: the model, of which all caches are.
        max_rows: most rows at a time.
    Raises:
        OptionTypeError, OptionError, UnsupportedModelError: an argument cannot work.
    """

    def __init__(self, model: nn.Module, max_rows: int) -> None:
        found = model_of(model)
        if found is None:
            raise OptionTypeError(
                f"model: expected a transformers model, got {type(model).__name__}; pass the model that the caches belong to"
            )
        parameters = set(inspect.signature(found.forward).parameters)
        names = [name for name in CACHE_NAMES if name in parameters]
        if not names or not {"input_ids", "position_ids"} <= parameters:
            raise UnsupportedModelError(
                f"{type(found).__name__}: expected a forward with input_ids, position_ids and a cache, got "
                f"{sorted(parameters)}; use generate for each sequence"
            )
        if ranks_of(found) is not None:
            raise UnsupportedModelError(
                f"{type(found).__name__}: expected a model on one rank, got one with tensor parallelism; call generate on all "
                "ranks, or load the model with a device_map"
            )
        self.model, self._cache_name = found, names[0]
        self._steps = RowSteps(found, names[0])
        self._rows: list[Row | None] = [None] * require_count("max_rows", max_rows, 1, example=32)

    @property
    def rows(self) -> list[SpinCache | None]:
        """The cache of each row; None for an empty row."""
        return [None if row is None else row.cache for row in self._rows]

    def expect(self, cache: SpinCache) -> None:
        """Note that an empty cache will join: missing kernels of rows are compiled while its prompt is read."""
        cache._passes.backends.row_sizes = sizes_up_to(len(self._rows))

    @outside_inference_mode
    def join(self, cache: SpinCache) -> int:
        """Add a cache to the batch.

        Args:
            cache: a `SpinCache` of the batch's model with one sequence, which holds its prompt. Method and options are those of
                the other rows; caps on memory may differ.
        Returns:
            the index of its row.
        Raises:
            OptionTypeError, OptionError, BatchSizeError, CacheStateError, UnsupportedModelError: the cache cannot be a row, or
                all rows are taken. Nothing has changed.
        """
        check_cache(cache, self.model)
        row = Row(cache)
        others = [other for other in self._rows if other is not None]
        if any(other.state is row.state for other in others):
            raise CacheStateError("cache: expected a cache that is not a row yet, got one that is; use a fork of it")
        if others:
            check_alike(row, others[0])
        if len(others) == len(self._rows):
            raise CacheStateError(
                f"expected an empty row, got {len(others)} of {len(others)} in use; call leave(row) first"
            )
        index = self._rows.index(None)
        self._rows[index] = row
        return index

    @outside_inference_mode
    def leave(self, row: int) -> SpinCache:
        """Take a cache out of the batch. It goes on by itself, for example with `generate`.

        What kernels have counted for it meanwhile is in its `stats()` from now on.

        Raises:
            OptionError: there is no cache in the row.
        """
        left = self._row(row)
        self._steps.forget(left)
        cache = left.leave()
        self._rows[row] = None
        return cache

    def step(self, tokens: dict[int, int], ids: Tensor | None = None) -> Tensor:
        """Append a token to each of the named rows, and return the logits of the tokens that follow.

        Args:
            tokens: row -> id of its new token. Other rows stay as they are.
            ids: [len(tokens)], int64, on the model's device: the new tokens, in the order of `tokens`, whose values are then
                not used. So a step can be launched before the host knows its tokens.
        Returns:
            [len(tokens), vocabulary], float32, in the order of `tokens`.
        Raises:
            OptionTypeError, OptionError: a row or a token is not one.
            BudgetError, CapacityError: memory ran out. `row` of the error is the one that does not fit, None if none is.
            Whatever the model's forward raises. Every cache is as before the step.
        """
        rows = self._named(tokens)
        with torch.inference_mode(False), torch.no_grad(), _decoding(self.model):
            if all(self._steps.serves(row) for row in rows.values()):
                return self._steps.step(rows, list(tokens.values()), ids)
            if may_be_captured(self.model):
                method = next(iter(rows.values())).state.method
                warn_eager(self.model, f"method {method} has no kernels for its layers")
            if ids is None:
                device: Any = self.model.device
                ids = torch.tensor(list(tokens.values()), dtype=torch.int64).to(device)
            return self._step(rows, ids[:, None])

    def close(self) -> None:
        """Let go of all caches, kernels and graphs. The batch is empty."""
        self._rows = [None] * len(self._rows)
        self._steps.drop()

    def _step(self, rows: dict[int, Row], ids: Tensor) -> Tensor:
        """`step` by PyTorch, in which each row attends by itself."""
        for index, row in rows.items():
            row.settle()
            with blaming(index):
                row.check_room()
        device: Any = self.model.device
        lengths = [row.length for row in rows.values()]
        positions = torch.tensor(lengths, dtype=torch.int64).to(device)[:, None]
        view = RowsView(rows, device)
        inputs: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "use_cache": True, "return_dict": True}
        with self._forward(rows, lengths):
            output = self.model(**inputs, **fixed_arguments(self.model, inputs), **{self._cache_name: view})
            view.shared.check_nothing_pending()
            logits: Tensor = output.logits[:, -1].float()
        view.write_back()
        kept = ids.to(torch.int32)
        for number, (row, length) in enumerate(zip(rows.values(), lengths, strict=True)):
            row.end(length, kept[number : number + 1])
        return logits

    @contextmanager
    def _forward(self, rows: dict[int, Row], lengths: list[int]) -> Iterator[None]:
        """One forward of all rows: at its end all are committed, or all rolled back."""
        try:
            with ExitStack() as stack:
                config = next(iter(rows.values())).cache.calls.config
                stack.enter_context(implementation.held(config))
                for row in rows.values():
                    stack.enter_context(row.passes.backends.forward())
                    stack.enter_context(row.log.watching([]))  # states of linear attention are not written
                yield
        except BaseException:
            for row, length in zip(rows.values(), lengths, strict=True):
                row.take_back(length)
            raise

    def _row(self, index: Any) -> Row:
        if not isinstance(index, int) or not 0 <= index < len(self._rows) or self._rows[index] is None:
            taken = [number for number, row in enumerate(self._rows) if row is not None]
            raise OptionError(f"row: expected one of {taken}, got {index!r}; pass what join returned")
        row = self._rows[index]
        assert row is not None
        return row

    def _named(self, tokens: dict[int, int]) -> dict[int, Row]:
        if not isinstance(tokens, dict) or not tokens:
            raise OptionTypeError(
                f"tokens: expected a dict of a row or more, got {tokens!r}; pass {{row: token id}} for the rows that go on"
            )
        for token in tokens.values():
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise OptionTypeError(f"tokens: expected token ids as ints, got {token!r}; pass {{row: int(token)}}")
        return {index: self._row(index) for index in tokens}


def _decoding(model: Any) -> AbstractContextManager[Any]:
    """The context in which `generate` decodes: experts of a model are then computed without waiting for the host."""
    optimized = getattr(model, "_optimize_model_for_decode", None)
    return nullcontext() if optimized is None else optimized()
