"""Loads a saved cache into another number of ranks than have saved it: each rank takes its heads from all parts that have some.

    saved by 2 ranks   [ heads 0 1 ][ heads 2 3 ]
    loaded by 4        [0] [1]   [2] [3]            one part each, of which some heads are taken
    loaded by 1        [ 0 1 2 3 ]                  all parts, side by side

Where all ranks held all heads, one part is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention.methods.layer_shapes import LayerShape, layer_shapes
from ..integration.layer_types import layers_with_contents
from ..integration.tensor_parallel import local_shapes
from ..state import CacheState
from ..storage.chunked_array import ChunkedArray
from ..storage.page_store import PageStore
from ..storage.page_table import SEGMENT_PAGES
from .contents import arrays_of, pages_per_row
from .fills import Destination, PagesMemory
from .fingerprint import ModelFacts
from .manifest import Manifest, OtherLayer, PagedLayer
from .reader import SavedCache
from .staging import Staging
from .strict_json import RefusedError


class Heads(NamedTuple):
    """KV heads [first, stop) of a layer of the whole model."""

    first: int
    stop: int

    def within(self, other: Heads) -> Heads:
        """Those that both have; empty if `stop` is not above `first`."""
        return Heads(max(self.first, other.first), min(self.stop, other.stop))


def open_saved(parts: Sequence[Path], verify: bool, number: int = 0, size: int = 1) -> SavedCache:
    """A saved cache, open for reading.

    Args:
        parts: the folder of each rank that saved it.
        verify: whether to compare checksums.
        number, size: of this rank, and of all ranks that load it.
    """
    if len(parts) == size:
        return SavedCache(parts[number], verify)
    return JoinedCache(parts, verify, number, size)


class JoinedCache(SavedCache):
    """The first part of a saved cache, which restores the others too.

    Args:
        parts, verify, number, size: as for `open_saved`.
    """

    def __init__(self, parts: Sequence[Path], verify: bool, number: int, size: int) -> None:
        self.others = list(parts[1:])
        self.number, self.size = number, size
        super().__init__(parts[0], verify)

    def restore(
        self, state: CacheState, layers: list[Any], config: Any, model: Any, facts: ModelFacts | None
    ) -> None:  # fmt: skip
        """As `SavedCache.restore`, from the parts that have heads of this rank."""
        shapes = layer_shapes(config, list(range(len(layers_with_contents(layers)))))
        own = local_shapes(shapes, model)
        try:
            if shapes is None or own is None:
                raise RefusedError(
                    "a config that names its heads", "none", "load it with as many ranks as have saved it"
                )
            self._check_states()
            with ExitStack() as opened:
                parts = [_Part(self.folder, self.verify)]
                opened.enter_context(closing(parts[0]))
                for folder in self.others:
                    parts.append(_Part(folder, self.verify))
                    opened.enter_context(closing(parts[-1]))
                _check_alike([part.manifest for part in parts])
                for index, part in enumerate(parts):
                    part.places = _Places(shapes, own, index, len(parts), self.number, self.size)
                used = [part for part in parts if part.places.has_some(part.manifest)]
                directory = None
                for part in used:
                    part.restore(state, layers, config, model, facts)
                    if directory not in (None, state.sequences.directory):
                        raise RefusedError("the same pages in all parts", "others (of another save?)")
                    directory = state.sequences.directory
            self._check_clusters(state)
        except (RefusedError, OSError) as error:
            raise self.named(error) from error

    def _check_states(self) -> None:
        for index, entry in enumerate(self.manifest.layers):
            if isinstance(entry, OtherLayer) and not entry.tensors.keys() <= {"keys", "values"}:
                raise RefusedError(
                    "layers with heads",
                    f"a {entry.kind} in layer {index}",
                    "load it with as many ranks as have saved it",
                )


class _Places:
    """Which heads of each layer a part has, and which this rank takes.

    Args:
        shapes, own: of the layers of the whole model, and of this rank.
        part, parts: number of the part, and of all parts.
        number, size: of this rank, and of all ranks.
    """

    def __init__(
        self, shapes: list[LayerShape], own: list[LayerShape], part: int, parts: int, number: int, size: int
    ) -> None:  # fmt: skip
        self.shapes, self.own = shapes, own
        self.part, self.parts, self.number, self.size = part, parts, number, size

    def wanted(self, index: int) -> Heads:
        """The heads that this rank has."""
        each, whole = self.own[index].num_heads, self.shapes[index].num_heads
        first = self.number * each if each < whole else 0
        return Heads(first, first + each)

    def saved(self, index: int, num_heads: int) -> Heads:
        """The heads that a part has whose layer has `num_heads`. If parts have all heads, only the first part counts."""
        whole = self.shapes[index].num_heads
        if num_heads == whole:
            return Heads(0, whole if not self.part else 0)
        if num_heads * self.parts != whole:
            raise RefusedError(f"{whole // self.parts} of {whole} heads in layer {index}", f"{num_heads}")
        return Heads(self.part * num_heads, (self.part + 1) * num_heads)

    def taken(self, index: int, num_heads: int) -> Heads:
        """The heads that this rank takes from the part."""
        return self.saved(index, num_heads).within(self.wanted(index))

    def has_some(self, manifest: Manifest) -> bool:
        """Whether this rank takes heads of any layer."""
        for index, entry in enumerate(manifest.layers):
            heads = _heads_in(entry)
            if heads and self.taken(index, heads).stop > self.taken(index, heads).first:
                return True
        return False


def _heads_in(entry: Any) -> int:
    """KV heads of a saved layer; 0 for none."""
    if isinstance(entry, PagedLayer):
        return entry.num_heads
    keys = entry.tensors.get("keys") if isinstance(entry, OtherLayer) else None
    return keys[1][1] if keys is not None and len(keys[1]) == 4 else 0


def _check_alike(manifests: list[Manifest]) -> None:
    """Refuse parts of different saves."""
    for name in ("batch_size", "length", "page_size", "num_segments", "padded", "positions", "span_stops", "tokens"):
        found = [getattr(manifest, name) for manifest in manifests]
        if any(each != found[0] for each in found):
            raise RefusedError(f"the same {name} in all parts", f"{found[:2]}")


class _Part(SavedCache):
    """A part of a saved cache, which restores the heads that this rank takes."""

    places: _Places

    def _heads_of(self, shapes: list[LayerShape] | None, model: Any) -> list[LayerShape] | None:
        return None  # `_Places.saved` checks them

    def _check_clusters(self, state: CacheState) -> None:
        """Nothing: heads of later parts are not there yet. `JoinedCache` checks those of all parts at the end."""

    def _allocated(self, index: int, entry: PagedLayer, layer: Any, device: torch.device) -> dict[str, Destination]:
        wanted = self.places.wanted(index)
        whole = entry.with_heads(wanted.stop - wanted.first)
        if layer.store is None:
            super()._allocated(index, whole, layer, device)
        taken, saved = (f(index, entry.num_heads) for f in (self.places.taken, self.places.saved))
        return {
            f"layers.{index}.{name}": HeadsMemory(layer.store, array, entry, name, taken, saved, wanted)
            for name, array in arrays_of(layer.store)
        }

    def _fitted(self, index: int, tensors: dict[str, Tensor], held: dict[str, Tensor] | None) -> dict[str, Tensor]:
        return {name: self._joined(index, tensor, (held or {}).get(name)) for name, tensor in tensors.items()}

    def _states(self, index: int, tensors: dict[str, Tensor], layer: Any) -> dict[str, Tensor]:
        return {name: self._joined(index, tensor, getattr(layer, name, None)) for name, tensor in tensors.items()}

    def _joined(self, index: int, tensor: Tensor, held: Tensor | None) -> Tensor:
        """The heads that are taken of a tensor [B, H, ...], behind those that were taken of earlier parts."""
        if tensor.dim() < 2:
            return tensor
        taken, saved = (f(index, tensor.shape[1]) for f in (self.places.taken, self.places.saved))
        own = tensor[:, max(0, taken.first - saved.first) : max(0, taken.stop - saved.first)]
        wanted = self.places.wanted(index)
        if held is None or held.dim() != tensor.dim() or taken.first == wanted.first:
            return own.contiguous()
        return torch.cat([held, own], 1)


class HeadsMemory(PagesMemory):
    """Rows of an array of a page store, of some heads.

    Args:
        store, array, entry, name: as for `PagesMemory`; the entry has the heads of the part.
        taken, saved, wanted: heads that are copied, that the file has, and that the store has.
    """

    def __init__(
        self, store: PageStore, array: ChunkedArray, entry: PagedLayer, name: str, taken: Heads, saved: Heads, wanted: Heads
    ) -> None:  # fmt: skip
        super().__init__(store, array, entry, name)
        self.is_direct = False
        self.taken, self.saved, self.wanted = taken, saved, wanted
        self.num_saved, self.num_wanted = entry.num_heads, store.num_heads
        self.each = SEGMENT_PAGES // pages_per_row(store, name)

    def put(self, begin: int, content: Tensor, staging: Staging) -> None:
        """Copy rows of heads that are taken. Those of other heads are dropped."""
        rows, first = self.rows_of(content), begin // self.row_bytes
        runs = self._runs(first, first + len(rows))
        if runs:
            picked = torch.cat([rows[start - first : stop - first] for start, stop, _ in runs])
            views = [view for start, stop, to in runs for view in self.array.views(to, to + stop - start)]
            staging.copy(picked, views, self.array.device)

    def _runs(self, first: int, stop: int) -> list[tuple[int, int, int]]:
        """[start, end) of rows in the file within [first, stop) that are taken, and the row that each run goes to."""
        found, each = [], self.each
        inside = (self.taken.first - self.saved.first) * each, (self.taken.stop - self.saved.first) * each
        shift = (self.saved.first - self.wanted.first) * each
        for segment in range(first // (self.num_saved * each), -(-stop // (self.num_saved * each))):
            base = segment * self.num_saved * each
            start, end = max(first, base + inside[0]), min(stop, base + inside[1])
            if start < end:
                found.append((start, end, segment * self.num_wanted * each + start - base + shift))
        return found
