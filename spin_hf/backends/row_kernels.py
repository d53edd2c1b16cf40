"""The Triton backend of rows: the launches of `StepKernels` over caches of one sequence each.

    step descriptors     [R, StepField]        row b: of its cache; position -1 if the row is empty, and kernels return at once
    layer descriptors    [L, R, LayerField]
    buffers of a step    [R * H, ...]          as those of a batch of R sequences

    seat        which cache is in which row
    begin_rows  descriptors of all rows, in one upload
    attend      as for a batch; the first call of a step may allocate scratch
    index_completed_rows (`triton_indexing.py`)     pages that some rows have completed

A captured step holds the addresses of the descriptors only, so it serves whatever caches are seated. Seating writes numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.descriptor_fields import StepField
from .descriptors import Binding
from .row_descriptors import RowDescriptors
from .triton_step import StepKernels

if TYPE_CHECKING:
    from ..kernels.triton_launchers import Launchers
    from ..state import CacheState, LayerState

EMPTY = -1
"""The position of a row without a cache."""
_SIZES = 4
"""Batches of rows have a power of this many places. Kernels and graphs are made for each size, and an empty place is cheap."""


def places_for(num_rows: int) -> int:
    """Places of the smallest batch that holds `num_rows` rows."""
    places = 1
    while places < num_rows:
        places *= _SIZES
    return places


def sizes_up_to(num_rows: int) -> list[int]:
    """Places of all batches that up to `num_rows` rows may take."""
    return sorted({places_for(number) for number in range(1, num_rows + 1)})


class RowKernels(StepKernels):
    """Launches for the layers of several caches with one device, number of KV heads and layout of pages.

    Args:
        state: of any of the caches: they have the same method and options.
        num_rows: places, empty ones included.
        launchers, device, num_heads: as for `StepKernels`.
    """

    apart = True
    least_splits = 4
    """One row may be much longer than the others."""

    def __init__(
        self, state: CacheState, launchers: Launchers, device: torch.device, num_rows: int, num_heads: int
    ) -> None:
        super().__init__(state, launchers, device, num_rows, num_heads)
        self.rows: list[RowDescriptors | None] = [None] * num_rows
        self.reads_all = False
        """Whether the current step attends to whole segments."""
        self._written: list[tuple[int, int] | None] = [None] * num_rows
        """Changes and past version of each row's cache that the tables have."""
        self._host_step = torch.zeros((num_rows, len(StepField)), dtype=torch.int64)
        self._steps = self._host_step.numpy()
        self._steps[:, StepField.POSITION] = EMPTY
        for layer in state.layers:
            self.selection.place(layer)

    @property
    def num_rows(self) -> int:
        """Rows of a step, empty ones included."""
        return self.batch_size

    def seat(self, rows: list[RowDescriptors | None]) -> None:
        """Give rows to caches. What a row's last cache has left for the next step is forgotten; its counts go to it."""
        for index, (row, held) in enumerate(zip(rows, self.rows, strict=True)):
            if row is held:
                continue
            if held is not None:
                held.add_counts(self.counters[:, index])
                self.counters[:, index] = 0
            self.rows[index], self._written[index] = row, None
            self._steps[index] = 0
            self._steps[index, StepField.POSITION] = EMPTY
            streams = slice(index * self.num_heads, (index + 1) * self.num_heads)
            for tensor, initial in self.carried[1:]:
                if tensor.shape[1]:
                    tensor[:, streams] = initial
            self.found_for[:, streams] = -1
        self._serve(next((row.state for row in rows if row is not None), None))

    def _serve(self, state: CacheState | None) -> None:
        """Let `state` be what the caches have in common; None to hold no cache."""
        self.binding.end()
        if state is not None:
            self.binding = Binding(state)
            self.binding.known = {"planned": False}

    # -------------------------------------------------------------------------------------------------------- a step

    def begin_rows(self) -> None:
        """Write the descriptors of a step that all seated caches have begun, in stream order.

        Raises:
            CapacityError: memory ran out.
        """
        seated = [(index, row) for index, row in enumerate(self.rows) if row is not None]
        self.binding.known = {"planned": False}
        for index, row in seated:
            row.refresh()
            if self.group:
                row.make_room(self.group)
            self._write(index, row)
            sequences = row.state.sequences
            self._steps[index, StepField.POSITION] = sequences.start
            self._steps[index, StepField.CLOCK] = sequences.step
        self.step.copy_(self._host_step, non_blocking=True)

    def _write(self, index: int, row: RowDescriptors) -> None:
        """Bring a row's descriptors up to date, those of the step on the host only."""
        written = row.changes, row.past_version
        if self._written[index] == written:
            return
        self._written[index] = None
        position, clock = self._steps[index, StepField.POSITION], self._steps[index, StepField.CLOCK]
        self._steps[index] = row.step - index * row.step_strides
        self._steps[index, StepField.POSITION], self._steps[index, StepField.CLOCK] = position, clock
        fields = torch.from_numpy(row.layers - index * row.layer_strides)
        self.layer_fields[:, index].copy_(fields, non_blocking=True)
        if self.recipe.outliers_per_1024:
            self.found_for[:, index * self.num_heads : (index + 1) * self.num_heads] = -1
        self._written[index] = written

    def make_room(self) -> None:
        """Allocate the scratch of rows that have none. Needed in the first step only, as `begin_rows` knows the group later."""
        if not self.group:
            return
        grown = [index for index, row in enumerate(self.rows) if row is not None and row.make_room(self.group)]
        for index in grown:
            row = self.rows[index]
            assert row is not None
            self._write(index, row)
        if grown:
            self.step.copy_(self._host_step, non_blocking=True)

    def begin(self, layer: LayerState) -> None:
        """Nothing: `begin_rows` has written all descriptors."""

    def begin_step(self) -> None:
        """Nothing, as `begin`."""

    def append(self, layer: LayerState, key: Tensor, value: Tensor) -> bool:
        """Not for rows: a step's token is appended by `attend`."""
        raise NotImplementedError

    def tokens_of_last_pages(self) -> tuple[Tensor, Tensor | None]:
        """As `summarize.tokens_of`, of the last page of each row: [R, 1, 1, P]. Those of empty rows mean nothing."""
        page_size = self.method.page_size
        valid = torch.ones((self.num_rows, 1, 1, page_size), dtype=torch.bool, device=self.device)
        if not self.method.uses_positions:
            return valid, None
        starts = [0 if row is None else (row.state.sequences.num_pages - 1) * page_size for row in self.rows]
        first = torch.tensor(starts).to(self.device, non_blocking=True)
        return valid, first[:, None, None, None] + torch.arange(page_size, device=self.device)

    def reads_segments(self) -> bool:
        """As `StepKernels.reads_segments`."""
        return self.reads_all

    def pays_for_rows(self, lengths: list[int]) -> bool:
        """Whether a step of rows with `lengths` tokens, the new ones included, should attend to whole segments.

        All rows do, or none: one launch serves all of them, and a captured step has one kind of launches. A row that the budget
        covers selects all of its pages then, which needs neither clusters nor summaries.
        """
        return self.pays_to_read_all(lengths) and all(row is None or row.resident for row in self.rows)
