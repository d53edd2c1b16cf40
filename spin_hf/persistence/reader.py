"""`SpinCache.from_pretrained`: checks a saved cache, then fills a new cache from it.

    open      parse the manifest, open the shards
    check     fingerprint and layers fit the new cache; sizes and headers of shards are those that the manifest implies
    restore   allocate within the caps of the new cache, read pages directly into their chunks, compare digests of shards;
              checksums are made while pieces are read, of pages on a GPU there, behind the copies
              check tables whose numbers are used as indices

No tensor is allocated before `restore`. Threads read a layer while memory of the next one is allocated. Pages pass through a
buffer only if they change their layout or go to a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor

from ..attention.methods.clustering import ClusteringMethod
from ..attention.methods.layer_shapes import LayerShape, layer_shapes
from ..attention.methods.registry import METHODS
from ..config import shown
from ..errors import CacheStateError, SpinError, require_integrity
from ..indexing import cluster
from ..indexing.fit import fits
from ..integration.device_map import layer_devices
from ..integration.layer_types import layers_with_contents
from ..integration.tensor_parallel import local_shapes
from ..state import CacheState
from ..storage.chunked_array import ChunkedArray
from ..storage.clustered_spans import ClusteredSpans
from ..storage.host_register import wait_for_stream
from ..storage.padding_mask import TokenMask
from ..storage.pinned_slab import slab_key
from ..storage.slabs_ahead import slabs_ahead
from ..storage.token_permutation import longest_span
from . import other_layers
from .contents import arrays_of
from .fills import Destination, PagesMemory, PlainTensor
from .fingerprint import ModelFacts, check_same, fingerprint
from .manifest import FILE_NAME, OPTIONS, Layer, OtherLayer, PagedLayer, pages_dtype
from .opened import OpenCache
from .shards import cut
from .strict_json import RefusedError


class SavedCache(OpenCache):
    """A saved cache that fills a new cache; see `OpenCache`."""

    def arguments(self, method: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Method and options for the new cache. The saved cache has the defaults."""
        saved = self.manifest.options
        try:
            if saved.keys() != set(OPTIONS):
                raise RefusedError(f"options {', '.join(OPTIONS)}", shown(sorted(saved), 120))
            return self._method() if method is None else method, {**saved, **options}
        except RefusedError as error:
            raise self.named(error) from error

    def _method(self) -> Any:
        about = self.manifest.fingerprint.get("method")
        about = about if isinstance(about, dict) else {}
        name, parameters = about.get("name"), about.get("parameters")
        kind = METHODS.get(name) if isinstance(name, str) else None
        if kind is None or about.get("class") != kind.__qualname__ or about.get("tensors") is not None:
            raise RefusedError("a method that its name describes", shown(name, 80), "pass method=, as for SpinCache")
        try:
            if not isinstance(parameters, dict) or parameters.keys() != kind().saved_parameters().keys():
                raise TypeError
            return kind(**parameters)
        except (SpinError, TypeError) as error:
            raise RefusedError(f"parameters of method {name!r}", shown(parameters, 120)) from error

    # ------------------------------------------------------------------------------------------------------- checking

    def restore(
        self, state: CacheState, layers: list[Any], config: Any, model: Any, facts: ModelFacts | None
    ) -> None:  # fmt: skip
        """Fill a new, empty cache.

        Args:
            state, layers, config: of the cache; `layers` are changed in place.
            model: the model; None if only the config is known.
            facts: of the model; None without one.
        Raises:
            SavedCacheError: the saved cache is damaged, or does not fit model, method or options.
            BudgetError, CapacityError: it does not fit the caps.
        """
        layers = layers_with_contents(layers)
        try:
            self._check(state, layers, config, model, facts)
            self._restore(state, layers, config, model)
        except (RefusedError, OSError) as error:
            raise self.named(error) from error

    def _check(
        self, state: CacheState, layers: list[Any], config: Any, model: Any, facts: ModelFacts | None
    ) -> None:  # fmt: skip
        made, method = self.manifest, state.method
        if len(made.layers) != len(layers):
            raise RefusedError(
                f"{len(layers)} layers as the model has", f"{len(made.layers)}", "use the model of the cache"
            )
        self._check_layers(state, layers, config, model)
        dtype = pages_dtype(made.layers)
        ours = fingerprint(config, facts, method, len(state.layers), state.options, dtype)
        check_same(made.fingerprint, ours)
        if method.page_size != made.page_size or (made.positions and not method.uses_positions):
            raise RefusedError(f"pages of {method.page_size} tokens", f"{made.page_size}")
        longest = max((stop - first for first, stop in ClusteredSpans(made.span_stops).bounds), default=0)
        if made.span_stops and not isinstance(method, ClusteringMethod):
            raise RefusedError("no spans, as the method does not cluster", "some")
        if longest * made.page_size > longest_span(made.page_size):
            raise RefusedError("spans that shifts can express", f"{longest} pages")
        for index, entry in enumerate(made.layers):
            if isinstance(entry, OtherLayer):
                other_layers.check(index, entry, layers[index], made.batch_size, made.length)
        self._check_files(state)

    def _heads_of(self, shapes: list[LayerShape] | None, model: Any) -> list[LayerShape] | None:
        """The shapes that this saved cache must have, from those of the whole model."""
        return local_shapes(shapes, model)

    def _check_layers(self, state: CacheState, layers: list[Any], config: Any, model: Any) -> None:
        """Refuse layers of other kinds than the model's, and pages of other sizes."""
        made = self.manifest
        paged = [layer.layer_idx for layer in state.layers]
        shapes = dict(
            zip(paged, self._heads_of(layer_shapes(config, paged), model) or (), strict=False)
        )  # empty if the config does not tell them
        spanned = made.span_stops[-1] if made.span_stops else 0
        for index, (entry, layer) in enumerate(zip(made.layers, layers, strict=True)):
            if (index in paged) == isinstance(entry, OtherLayer):
                raise RefusedError(f"layer {index} as a {type(layer).__name__}", shown(entry, 120))
            if not isinstance(entry, PagedLayer):
                continue
            if entry.clustered_pages != spanned:
                raise RefusedError(f"{spanned} clustered pages in layer {index}", f"{entry.clustered_pages}")
            if entry.fitted and not fits(state.method):
                raise RefusedError(f"no fitted tensors in layer {index}, as the method fits none", "some")
            found = LayerShape(entry.num_heads, entry.key_dim, entry.value_dim)
            expected = shapes.get(index, found)
            if expected != found:
                raise RefusedError(f"layer {index} with {expected} as the model has", f"{found}")

    def _check_files(self, state: CacheState) -> None:
        """Compare names, sizes and headers with those that the manifest implies."""
        made = self.manifest
        specs = made.specs(state.method, state.options)
        whole = sum(file.size for file in self.files)
        if sum(spec.num_bytes for spec in specs) > whole:  # before a long list of shards is made
            raise RefusedError(f"{sum(spec.num_bytes for spec in specs)} bytes of tensors", f"{whole} (was it cut?)")
        shards = cut(specs, made.max_shard_bytes, made.save_id, len(made.shards))
        if len(shards) != len(made.shards):
            raise RefusedError(f"{len(shards)} shards", f"{len(made.shards)}")
        for shard, file, (name, size, _) in zip(shards, self.files, made.shards, strict=True):
            if shard.name != name:
                raise RefusedError(f"a shard {shard.name}", shown(name, 80))
            if not shard.num_bytes == size == file.size:
                raise RefusedError(f"{shard.num_bytes} bytes in {name}", f"{file.size} (was it cut?)")
            header = bytearray(len(shard.header))
            file.read_into([memoryview(header)], 0)
            if header != shard.header:
                raise RefusedError(f"the header of {name} that {FILE_NAME} implies", "another one")
        self.set_shards(shards)

    # ------------------------------------------------------------------------------------------------------ restoring

    def _restore(self, state: CacheState, layers: list[Any], config: Any, model: Any) -> None:
        made = self.manifest
        devices = layer_devices(model, len(layers))
        if state.layers and made.num_segments:
            self._restore_tables(state, devices[state.layers[0].layer_idx])
        others: list[tuple[OtherLayer, int, dict[str, PlainTensor]]] = []
        fitted: dict[int, dict[str, PlainTensor]] = {}
        by_index = {layer.layer_idx: layer for layer in state.layers}
        with ExitStack() as ahead, self.reader() as reading:  # reads one layer while the next one's memory is allocated
            for index, (entry, layer, device) in enumerate(zip(made.layers, layers, devices, strict=True)):
                if isinstance(entry, PagedLayer):
                    reading.submit(self.reads(self._allocated(index, entry, layer, device)))
                    if entry.fitted:
                        specs = made.fitted_specs(index, entry, state.method)
                        fitted[index] = {name: PlainTensor(spec.dtype, spec.shape) for name, spec in specs.items()}
                        reading.submit(self.reads({specs[name].name: held for name, held in fitted[index].items()}))
                    if layer.store.is_registered and index == state.layers[0].layer_idx:
                        alike = later_layers_alike(made.layers, devices, index)
                        ahead.enter_context(_memory_ahead(layer.store.backing, alike))
                elif entry is not None:
                    plain = {name: PlainTensor(*of_tensor) for name, of_tensor in entry.tensors.items()}
                    reading.submit(self.reads({f"layers.{index}.{name}": held for name, held in plain.items()}))
                    others.append((entry, index, plain))
            reading.finish()
        self.compare_digests()
        for entry, index, tensors in others:
            placed = {name: tensor.finished(devices[index]) for name, tensor in tensors.items()}
            other_layers.restore(entry, layers[index], self._states(index, placed, layers[index]))
        for index, entry in enumerate(made.layers):
            if isinstance(entry, PagedLayer):
                state_of, store = by_index[index], layers[index].store
                store.length, state_of.clustered_pages, state_of.stale_pages = entry.length, entry.clustered_pages, None
                held = {name: tensor.finished(devices[index]) for name, tensor in fitted.get(index, {}).items()}
                state_of.fitted = self._fitted(index, held, state_of.fitted) or None
                if store.backing.converted and not entry.int8:
                    state_of.invalidate(0, entry.length // made.page_size)
        if state.layers and made.num_segments:
            state.committed = state.exact = made.length
            state.visible_length.fill_(made.length)
            self._check_clusters(state)

    def _states(self, index: int, tensors: dict[str, Tensor], layer: Any) -> dict[str, Tensor]:
        """What a layer of transformers' own gets of its saved tensors."""
        return tensors

    def _fitted(self, index: int, tensors: dict[str, Tensor], held: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """What a paged layer gets of its fitted tensors. `held` is what it has."""
        return tensors

    def _allocated(self, index: int, entry: PagedLayer, layer: Any, device: torch.device) -> dict[str, Destination]:
        """Allocate a paged layer. Returns the memory of its tensors."""
        sizes = self.manifest.batch_size, entry.num_heads, 0
        states = [
            torch.empty((*sizes, dim), dtype=entry.dtype, device=device) for dim in (entry.key_dim, entry.value_dim)
        ]
        layer.lazy_initialization(*states)
        wait_for_stream(device)  # threads write to the new memory on streams of their own
        named = arrays_of(layer.store)
        return {f"layers.{index}.{name}": PagesMemory(layer.store, array, entry, name) for name, array in named}

    def _restore_tables(self, state: CacheState, device: torch.device) -> None:
        """Read the tables that all layers share, check them, and give them to the page table."""
        made = self.manifest
        tables = {
            spec.name: PlainTensor(spec.dtype, spec.shape)
            for spec in made.specs(state.method, state.options)
            if spec.name in ("directory", "valid", "positions", "clustered")
        }
        with self.reader(tables) as reading:
            reading.submit(self.reads(tables))
            reading.finish()
        read = {name: table.finished(torch.device("cpu")) for name, table in tables.items()}
        directory = read["directory"].tolist()
        indices = [segment for row in directory for segment in row]
        if set(indices) != set(range(made.num_segments)):
            raise RefusedError(f"a directory of segments 0 to {made.num_segments - 1}", "other segments")
        positions = read.get("positions")
        if positions is not None and not 0 <= int(positions.min()) <= int(positions.max()) <= made.length:
            raise RefusedError(f"positions from 0 to {made.length}", "others")
        refcounts = torch.bincount(torch.tensor(indices), minlength=made.num_segments).tolist()
        mask = TokenMask(state.method.uses_positions, _placed(read.get("valid"), device), _placed(positions, device))
        spans = ClusteredSpans(list(made.span_stops), read["clustered"]) if made.span_stops else ClusteredSpans()
        state.sequences.restore(
            {"directory": directory, "refcounts": refcounts, "free": [], "mask": mask, "spans": spans,
             "start": made.length, "length": made.length}
        )  # fmt: skip

    def _check_clusters(self, state: CacheState) -> None:
        """Refuse shifts and clusters that are no valid indices, and spans that the options do not allow.

        All layers are checked before the host waits for the result.
        """
        held = [layer.store.permutation for layer in state.layers if layer.store is not None]
        found: dict[torch.device, list[Tensor]] = {}
        for permutation in filter(None, held):
            found.setdefault(permutation.device, []).append(permutation.stays_in_spans())
        try:
            for flags in found.values():
                require_integrity(bool(torch.stack(flags).all()), "a token is in another span, or clusters overlap")
            if state.sequences.spans.stops:
                cluster.check_integrity(state)
        except CacheStateError as error:
            raise RefusedError("clusters of tokens within their spans", f"other ones ({error})") from error


def later_layers_alike(entries: Sequence[Layer], devices: Sequence[torch.device], index: int) -> int:
    """How many layers behind layer `index` have pages of the same sizes on the same device."""
    first, *later = zip(entries[index:], devices[index:], strict=False)
    return sum(other == first for other in later)


def _memory_ahead(pages: ChunkedArray, count: int) -> AbstractContextManager[None]:
    """Within this context, host memory for the pages of `count` other layers like this one is page-locked ahead."""
    key = slab_key(len(pages.chunks), pages.rows_per_chunk * pages.row_bytes, pages.compute_device)
    return slabs_ahead(count, key)


def _placed(table: Tensor | None, device: torch.device) -> Tensor | None:
    return None if table is None else table.to(device)
