"""A step of up to R rows by kernels: static inputs, the model's forward, and its CUDA graphs.

    seat      caches take places 0 ... R - 1; windows and states are copied to their rows
    begin     descriptors and inputs of all rows
    run       the forward: called the first time, captured the second, replayed later; separate graphs for steps that read all
              tokens, and for those in which all windows are full, which need no mask
    finish    completed pages are summarised

Whatever caches are seated, the graph is the same: it reads descriptors and static tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer, LinearAttentionLayer

from ..attention.handed_states import hand_out
from ..backends.base import Call
from ..backends.row_descriptors import RowDescriptors
from ..backends.row_kernels import RowKernels
from ..backends.triton_indexing import index_completed_rows
from ..graph import runner
from ..graph.eligibility import fixed_arguments
from ..layer import SpinLayer
from .row import Row
from .row_views import PagedRows, SharedState
from .static_rows import StaticWindow, linear_tensors, put_linear, static_linear

Place = tuple[torch.device, int]
"""Device and number of KV heads of layers."""


class KernelRows(PagedRows):
    """One paged layer of all rows, served by kernels.

    Args:
        layer_idx: index in the model.
        shared: of the view.
        kernels: that serve the layer.
    """

    def __init__(self, layer_idx: int, shared: SharedState, kernels: RowKernels) -> None:
        super().__init__(layer_idx, {}, shared)
        self.kernels = kernels
        self.number = next(layer.number for layer in kernels.state.layers if layer.layer_idx == layer_idx)

    def get_seq_length(self) -> int:
        """Not known on the host while a step is captured. Positions of each row are given to the model."""
        return 1

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As `PagedRows.update`."""
        self.check_shape(key_states, self.kernels.num_rows)
        self.cache_state.pending = self
        return hand_out(self, key_states, value_states)

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None, out: Tensor,
        append: bool, scale: float, softcap: float | None,
    ) -> None:  # fmt: skip
        """As `PagedRows.run`, in one set of launches for all rows."""
        call = Call(query.unflatten(1, (key.shape[1], -1)), scale, softcap, sinks)
        self.kernels.attend(self.kernels.state.layers[self.number], call, out, (key, value) if append else None)


class ProgramView(Cache):
    """The cache that the model is called with.

    Args:
        layers: of all rows.
        positions: int64 [R, 1], of the new tokens.
        shared: of the layers.
    """

    def __init__(self, layers: list[Any], positions: Tensor, shared: SharedState) -> None:
        super().__init__(layers=layers)
        self.positions, self.shared = positions, shared

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Tokens of the longest row, on the device: it changes between replays."""
        return self.positions.max()


class RowProgram:
    """Steps of R rows with one layout of pages.

    Args:
        model: the model.
        cache_name: the argument of its forward that takes the cache.
        like: any row.
        kernels: place of layers -> the kernels of R rows.
    """

    def __init__(self, model: nn.Module, cache_name: str, like: Row, kernels: dict[Place, RowKernels]) -> None:
        self.model, self.cache_name, self.kernels = model, cache_name, kernels
        self.num_rows = next(iter(kernels.values())).num_rows
        self.rows: list[Row | None] = [None] * self.num_rows
        device: Any = model.device
        self.inputs = torch.zeros((2, self.num_rows, 1), dtype=torch.int64, device=device)
        """Ids and positions of the new tokens."""
        self.shared = SharedState(like.state.model_name)
        self.view = ProgramView([self._layer(layer) for layer in like.layers], self.inputs[1], self.shared)
        self.windows = [
            (number, layer) for number, layer in enumerate(self.view.layers) if isinstance(layer, StaticWindow)
        ]
        chunked = "chunked_attention" in (getattr(like.cache.calls.config, "layer_types", None) or ())
        self._full_from = max((layer.width for _, layer in self.windows), default=0) if not chunked else 1 << 62
        """Tokens from which on no window of a row needs a mask. Chunked attention always does."""
        linear = [layer for layer in self.view.layers if type(layer) is LinearAttentionLayer]
        self.overwritten = [tensor for _, layer in self.windows for tensor in layer.tensors()]
        """The windows and states that a step overwrites."""
        self.overwritten += [tensor for layer in linear for tensor in linear_tensors(layer)]
        self.all_full = False
        """Whether all windows of all rows are full in this step, so that attention needs no mask."""
        self.reads_all = False
        self.graphs: dict[Any, Recording | None] = {}
        """By what the steps have in common; None if such a step has run once, eagerly."""

    def _layer(self, own: Any) -> Any:
        if isinstance(own, SpinLayer):
            store = own.store
            assert store is not None
            return KernelRows(own.layer_idx, self.shared, self.kernels[store.device, store.num_heads])
        if type(own) is DynamicSlidingWindowLayer:
            return StaticWindow(own, self.num_rows, self.inputs[1])
        return static_linear(own, self.num_rows) if type(own) is LinearAttentionLayer else own

    def seat(self, rows: list[Row | None], descriptors: dict[Place, list[RowDescriptors | None]]) -> None:
        """Give each place a row, or none.

        Args:
            descriptors: for the kernels of each place of layers, those of the rows.
        """
        for place, kernels in self.kernels.items():
            kernels.seat(descriptors[place])
        for index, (row, held) in enumerate(zip(rows, self.rows, strict=True)):
            if row is held:
                continue
            if held is not None and held.seated_in is self:
                held.own_states()
            self.rows[index] = row
        for index, row in self.seated():
            if row.seated_in is not self:
                self._put(index, row)

    def _put(self, index: int, row: Row) -> None:
        for layer, own in zip(self.view.layers, row.layers, strict=True):
            if isinstance(layer, StaticWindow):
                layer.put(index, own)
            elif type(layer) is LinearAttentionLayer:
                put_linear(layer, index, own)
        row.seated_in = self

    def seated(self) -> Iterator[tuple[int, Row]]:
        """Places and their rows, without empty ones."""
        return ((index, row) for index, row in enumerate(self.rows) if row is not None)

    def pays_to_read_all(self) -> bool:
        """Whether the next step of these rows should attend to whole segments."""
        lengths = [row.length + 1 for _, row in self.seated()]
        return all(kernels.pays_for_rows(lengths) for kernels in self.kernels.values())

    @property
    def reads_all(self) -> bool:
        """Whether the current step does so."""
        return self._reads_all

    @reads_all.setter
    def reads_all(self, value: bool) -> None:
        self._reads_all = value
        for kernels in self.kernels.values():
            kernels.reads_all = value

    def begin(self, tokens: list[int], ids: Tensor | None) -> None:
        """Write descriptors and inputs of a step that all rows have begun.

        Args:
            tokens: the new token of each place, or its place in `ids` [n], int64, on the device, if these are given; anything
                for empty ones.
        Raises:
            CapacityError: memory ran out.
        """
        positions = [0 if row is None else row.state.sequences.start for row in self.rows]
        self.all_full = all(row.state.sequences.start >= self._full_from for _, row in self.seated())
        for _, window in self.windows:
            window.all_full = self.all_full
        for kernels in self.kernels.values():
            kernels.begin_rows()
        self.inputs.copy_(torch.tensor([tokens, positions]).unsqueeze(2), non_blocking=True)
        if ids is not None:
            self.inputs[0, :, 0] = ids[self.inputs[0, :, 0]]

    def is_resident(self) -> bool:
        """Whether all pages of the rows are in the compute tier."""
        found = [descriptors for _, row in self.seated() for descriptors in row.descriptors.values()]
        for descriptors in found:
            descriptors.refresh()
        return all(descriptors.resident for descriptors in found)

    def arguments(self) -> dict[str, Any]:
        """Arguments of the model's forward."""
        ids, positions = self.inputs
        given: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "use_cache": True, "return_dict": True}
        return {**given, **fixed_arguments(self.model, given), self.cache_name: self.view}

    def restart(self) -> None:
        """Launch a step that has begun once more."""
        self.shared.pending = None
        for kernels in self.kernels.values():
            kernels.binding.known["planned"] = False

    def record(self) -> Recording:
        """Capture the forward. Windows and states are as before."""
        with self._restoring():
            return Recording(self)

    def forward_or_restore(self) -> Tensor:
        """As `forward`. If it fails, windows and states are as before."""
        with self._restoring():
            return self.forward()

    @contextmanager
    def _restoring(self) -> Iterator[None]:
        before = [tensor.clone() for tensor in self.overwritten]
        try:
            yield
        except BaseException:
            self.shared.pending = None
            for tensor, copy in zip(self.overwritten, before, strict=True):
                tensor.copy_(copy)
            raise

    def forward(self) -> Tensor:
        """Call the model. Returns the logits of all places, [R, vocabulary], float32."""
        output = self.model(**self.arguments())
        self.shared.check_nothing_pending()
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def finish(self) -> None:
        """Summarise the pages that rows have completed."""
        for kernels in self.kernels.values():
            index_completed_rows(kernels)

    def count(self) -> None:
        """Count the token in the windows' layers of all rows."""
        for number, window in self.windows:
            for index, row in self.seated():
                window.count(index, row.layers[number], row.length)


class Recording:
    """A captured step of a program.

    Args:
        program: whose forward is captured. Nothing is computed yet.
    """

    def __init__(self, program: RowProgram) -> None:
        devices = dict.fromkeys([program.inputs.device, *(device for device, _ in program.kernels)])
        self.recorder = runner.Recorder(list(devices))
        self.logits: Tensor = self.recorder.record(program.forward)

    def replay(self) -> Tensor:
        """Launch the step. Returns the static logits, which the next replay overwrites."""
        self.recorder.replay()
        return self.logits
