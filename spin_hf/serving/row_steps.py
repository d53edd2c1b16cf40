"""Steps of rows by kernels: all rows begin, one forward per layout of pages, all rows commit.

    seats       kind  ->  [ row | row | - | row ]      1, 4, 16, 64 ... places
    programs    kind and number of places  ->  `RowProgram`, with its graphs

    step        seat  ->  begin each row  ->  descriptors, inputs  ->  forwards  ->  completed pages  ->  commit each row
                                          on an error: every row is rolled back

Rows keep their places while they step together. A row that joins, leaves or pauses changes numbers in descriptors. A kind is a
method, its options and a layout of pages: rows with int8 pages and rows without need launches of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..attention import implementation
from ..attention.methods.base import recipe_of
from ..backends.row_descriptors import RowDescriptors, layout_of
from ..backends.row_kernels import RowKernels, places_for
from ..errors import SpinError
from ..graph import model_calls
from ..graph.eligibility import ModelGuard, host_state, reason_not_replayed, reason_of_model
from ..graph.runner import warn_eager
from ..kernels import device_limits
from .row import Row, of_steps
from .row_errors import blaming
from .row_program import Place, RowProgram


class RowSteps:
    """The steps of one batch of rows.

    Args:
        model: the model.
        cache_name: the argument of its forward that takes the cache.
    """

    def __init__(self, model: nn.Module, cache_name: str) -> None:
        self.model, self.cache_name = model, cache_name
        self._kinds: list[Any] = []
        """Methods, options and layouts of pages that rows have had."""
        self._programs: dict[tuple[int, int], RowProgram] = {}
        self._seats: dict[int, list[Row | None]] = {}
        self._guard: ModelGuard | None = None
        self._refused: str | None = None
        """Why steps of this model are not captured; None if they may be."""
        self._is_checked = True
        """Whether the model has been compared with its guard in this step."""

    def serves(self, row: Row) -> bool:
        """Whether kernels serve all layers of a row. Makes its descriptors."""
        if row.descriptors:
            return True
        recipe, places = recipe_of(row.state.method), set()
        for layer in row.state.layers:
            store = layer.store
            launchers = None if store is None else kernels.launchers(store.device)
            if store is None or recipe is None or launchers is None:
                return False
            if not recipe.serves(store.key_dim, store.value_dim):
                return False
            sizes = max(store.key_dim, store.value_dim), store.dtype.itemsize
            limits = device_limits.shared_memory(store.device), device_limits.multiplies(store.device)
            if recipe.scans_codes and not launchers.tile_units(
                *sizes, *limits
            ):  # pages that rows complete need the kernel
                return False
            places.add((store.device, store.num_heads))
        assert recipe is not None
        row.descriptors = {place: RowDescriptors(row.state, *place, recipe) for place in places}
        return True

    def forget(self, row: Row) -> None:
        """Take a row out of its seat, if it has one."""
        for (kind, number), program in self._programs.items():
            if row in program.rows:
                seats = [None if held is row else held for held in program.rows]
                self._move(program, seats)
                if len(self._seats.get(kind, [])) == number:
                    self._seats[kind] = seats

    def drop(self) -> None:
        """Let go of kernels, graphs and rows."""
        for program in self._programs.values():  # which are part of reference cycles
            program.graphs.clear()
            self._move(program, [None] * len(program.rows))
        self._programs.clear()
        self._seats.clear()

    def step(self, rows: dict[int, Row], tokens: list[int], ids: Tensor | None = None) -> Tensor:
        """As `RowBatch.step`, for rows that kernels serve."""
        given = dict(zip(rows.values(), tokens if ids is None else range(len(tokens)), strict=True))
        names = {row: index for index, row in rows.items()}
        for row in given:
            row.settle()
        lengths = {row: row.length for row in given}
        programs = self._begin(names)
        ran: list[RowProgram] = []
        try:
            with implementation.held(next(iter(given)).cache.calls.config):
                made = [self._run(program, given, ids, ran) for program in programs]
            if not self._is_checked and not self._has_same_model():  # while the device works
                self._roll_back(lengths, ran)
                return self.step(rows, tokens, ids)
            for program in programs:
                program.finish()
            appended = torch.cat([program.inputs[0].to(torch.int32) for program in programs])
            order = {row: place for place, row in enumerate(row for program in programs for row in program.rows)}
            chosen = torch.tensor([order[row] for row in given]).to(appended.device, non_blocking=True)
            logits = (made[0] if len(made) == 1 else torch.cat(made))[chosen]
            for row, length in lengths.items():  # only an interruption can stop this
                row.passes.finish_row()
                row.log.clear()
                row.end(length, appended[order[row] : order[row] + 1])
            for program in programs:
                program.count()
        except BaseException:
            self._roll_back(lengths, ran)
            raise
        return logits

    # ---------------------------------------------------------------------------------------------------------- seats

    def _seat(self, rows: dict[Row, int]) -> list[RowProgram]:
        """Seat the rows of a step, and nobody else."""
        groups: dict[int, list[Row]] = {}
        for row in rows:
            groups.setdefault(self._kind_of(row), []).append(row)
        for kind in list(self._seats.keys() - groups.keys()):
            self._sit(kind, [])
        return [self._sit(kind, _places(self._seats.get(kind, []), wanted)) for kind, wanted in groups.items()]

    def _kind_of(self, row: Row) -> int:
        """The number of a row's method, options and layout of pages: rows of one launch have the same."""
        version = row.state.sequences.layout_version
        if row.kind is None or row.kind[0] != version:
            kind = row.state.method, of_steps(row.state.options), layout_of(row.state)
            if kind not in self._kinds:
                self._kinds.append(kind)
            row.kind = version, self._kinds.index(kind)
        return row.kind[1]

    def _sit(self, kind: int, seats: list[Row | None]) -> Any:
        """Let rows take places. Returns their program; None for no places."""
        program = self._programs.get((kind, len(seats)))
        if program is None and seats:
            like = next(row for row in seats if row is not None)
            program = self._programs[kind, len(seats)] = self._new_program(like, len(seats))
        before = self._seats.pop(kind, None)
        if before is not None and len(before) != len(seats):
            self._move(self._programs[kind, len(before)], [None] * len(before))
        if program is not None:
            self._seats[kind] = seats
            self._move(program, seats)
        return program

    def _move(self, program: RowProgram, seats: list[Row | None]) -> None:
        """Let rows take the places of a program, if they do not have them."""
        if program.rows != seats:
            descriptors = {
                place: [None if row is None else row.descriptors[place] for row in seats] for place in program.kernels
            }
            program.seat(seats, descriptors)

    def _new_program(self, like: Row, num_rows: int) -> RowProgram:
        made: dict[Place, RowKernels] = {}
        for place in like.descriptors:
            launchers = kernels.launchers(place[0])
            assert launchers is not None
            made[place] = RowKernels(like.state, launchers, place[0], num_rows, place[1])
        return RowProgram(self.model, self.cache_name, like, made)

    # --------------------------------------------------------------------------------------------------------- a step

    def _begin(self, rows: dict[Row, int]) -> list[RowProgram]:
        """Begin a step of all rows. If that has changed a row's layout of pages, begin again with other seats."""
        while True:
            programs, lengths = self._seat(rows), {row: row.length for row in rows}
            layouts = {row: row.state.sequences.layout_version for row in rows}
            try:
                for program in programs:
                    self._begin_rows(program, rows)
                if all(row.state.sequences.layout_version == version for row, version in layouts.items()):
                    return programs
            except BaseException:
                self._roll_back(lengths, [])
                raise
            self._roll_back(lengths, [])

    def _begin_rows(self, program: RowProgram, rows: dict[Row, int]) -> None:
        program.reads_all = program.pays_to_read_all()
        for _, row in program.seated():
            with blaming(rows[row]):
                row.passes.prepare_row(program.reads_all)
        if program.reads_all and not program.is_resident():  # a page has moved in between
            program.reads_all = False
            for _, row in program.seated():
                with blaming(rows[row]):
                    row.passes.select_after_all()

    def _run(self, program: RowProgram, given: dict[Row, int], ids: Tensor | None, ran: list[RowProgram]) -> Tensor:
        """The forward of one program: called, captured or replayed. Returns the logits of its places.

        Args:
            given: the token of each row; its place in `ids` if these are given.
            ran: gets the program once its windows and states are those behind the step.
        """
        program.begin([0 if row is None else given[row] for row in program.rows], ids)
        key, graphs = (program.reads_all, program.all_full, host_state()), program.graphs
        if not self._may_capture(program, key):
            return self._call(program, ran)
        if key not in graphs:
            graphs[key] = None
            return self._call(program, ran)
        recording = graphs[key]
        if recording is None:
            try:
                recording = graphs[key] = program.record()
            except (SpinError, MemoryError):
                raise
            except torch.OutOfMemoryError as error:
                warn_eager(self.model, f"capturing failed: {_first_line(error)}")
                del graphs[key]  # the next step runs eagerly, the one after it is captured again
            except Exception as error:
                self._refused = f"capturing failed: {_first_line(error)}"
                warn_eager(self.model, self._refused)
            if recording is None:
                program.restart()
                return self._call(program, ran)
        ran.append(program)
        return recording.replay()

    def _call(self, program: RowProgram, ran: list[RowProgram]) -> Tensor:
        logits = program.forward_or_restore()
        ran.append(program)
        return logits

    def _may_capture(self, program: RowProgram, key: Any) -> bool:
        """Whether a step may be a graph. Drops all graphs if the model has changed since they were captured.

        Comparing the model takes host time, in which the device would be idle. A replay that can be rolled back is launched
        first, if it reads valid memory.
        """
        if not model_calls.may_be_captured(self.model):
            return False
        guard = self._guard
        late = guard is not None and program.graphs.get(key) is not None and not program.overwritten and guard.is_safe()
        if late:
            self._is_checked = False
        elif not self._has_same_model():
            guard = self._guard = ModelGuard(self.model)
            self._refused = reason_of_model(self.model)
            for each in self._programs.values():
                each.graphs.clear()
        assert guard is not None
        reason = self._refused or reason_not_replayed(guard, [], program.arguments(), self.cache_name)
        if reason is not None:
            warn_eager(self.model, reason)
        return reason is None

    def _has_same_model(self) -> bool:
        """Whether the model is as it was when steps were captured."""
        self._is_checked = True
        same = self._guard is not None and self._guard.unchanged()
        if not same:
            self._guard = None
        return same

    def _roll_back(self, lengths: dict[Row, int], ran: list[RowProgram]) -> None:
        """Roll every row back. A program that ran has overwritten windows or states, which leaves those rows unusable.

        Args:
            lengths: tokens of each row before the step.
        """
        for row, held in lengths.items():
            row.log.clear()
            row.log.overwritten = any(row in program.rows and bool(program.overwritten) for program in ran)
            row.passes.roll_back(held)


def _places(held: list[Row | None], wanted: list[Row]) -> list[Row | None]:
    """Places for rows, those that they have where possible."""
    seats: list[Row | None] = [None] * places_for(len(wanted))
    waiting = []
    for row in wanted:
        index = held.index(row) if row in held else len(seats)
        if index < len(seats):
            seats[index] = row
        else:
            waiting.append(row)
    for index, seat in enumerate(seats):
        if seat is None and waiting:
            seats[index] = waiting.pop(0)
    return seats


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error) else repr(error)
