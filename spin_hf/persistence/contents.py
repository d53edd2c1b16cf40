"""What a cache holds, as tensors and a manifest, for `save_pretrained`.

segments in use          ->  renumbered in the order of sequences, each written once
places without a token   ->  zeros, so that no unrelated memory gets into a file
everything else          ->  as it is stored, in either tier
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor

from ..errors import OptionError
from ..integration.layer_types import is_placeholder
from ..state import CacheState, LayerState
from ..storage.chunked_array import ChunkedArray
from ..storage.host_register import wait_for_device
from ..storage.page_store import PageStore
from ..storage.page_table import SEGMENT_PAGES
from .fingerprint import ModelFacts, fingerprint, tokens_hash
from .manifest import OPTIONS, Layer, Manifest, OtherLayer, PagedLayer, pages_dtype
from .other_layers import contents
from .shards import DTYPES, PIECE_BYTES, Part, bytes_of
from .staging import Staging, has_streams, in_host_memory


class Contents:
    """A cache as tensors and a manifest."""

    def __init__(
        self, state: CacheState, layers: list[Any], config: Any, model: ModelFacts | None, length: int, batch_size: int,
        tokens: Tensor | None, max_shard_bytes: int,
    ) -> None:  # fmt: skip
        self.state, self.sequences = state, state.sequences
        found: dict[int, int] = {}  # segment -> index in its sequences
        for row in self.sequences.directory:
            for index, segment in enumerate(row):
                found.setdefault(segment, index)
        self.segments, self.places = list(found), list(found.values())
        numbers = {segment: number for number, segment in enumerate(found)}
        mask, spans = self.sequences.mask, self.sequences.spans
        self.tensors: dict[str, Tensor] = {}
        if tokens is not None:
            self.tensors["tokens"] = tokens
        if found:
            rows = [[numbers[segment] for segment in row] for row in self.sequences.directory]
            self.tensors["directory"] = torch.tensor(rows, dtype=torch.int32)
        if mask.valid is not None:
            self.tensors["valid"] = mask.valid
        if mask.positions is not None:
            self.tensors["positions"] = mask.positions
        if spans.stops:
            self.tensors["clustered"] = spans.clustered
        self.stores: dict[str, tuple[PageStore, ChunkedArray, str]] = {}
        paged = {layer.layer_idx: layer for layer in state.layers}
        entries = [
            self._paged(paged[index]) if index in paged else self._other(index, layer)
            for index, layer in enumerate(layers)
        ]
        options = {name: getattr(state.options, name) for name in OPTIONS}
        self.manifest = Manifest(
            save_id=secrets.token_hex(6),
            fingerprint=fingerprint(
                config, model, state.method, len(state.layers), state.options, pages_dtype(entries)
            ),
            options=options, batch_size=batch_size, length=length, page_size=self.sequences.page_size,
            num_segments=len(self.segments), padded=mask.valid is not None, positions=mask.positions is not None,
            span_stops=list(spans.stops), tokens=None if tokens is None else tokens_hash(tokens), layers=entries,
            max_shard_bytes=max_shard_bytes, versions={"transformers": transformers.__version__, "torch": torch.__version__},
        )  # fmt: skip

    def _paged(self, layer: LayerState) -> Layer:
        store = layer.store
        if store is None:
            return None
        entry = PagedLayer(
            store.num_heads, store.key_dim, store.value_dim, store.dtype, store.backing.converted, store.length,
            layer.clustered_pages, layer.fitted is not None,
        )  # fmt: skip
        for name, tensor in (layer.fitted or {}).items():
            self.tensors[f"layers.{layer.layer_idx}.fitted.{name}"] = tensor
        for name, array in arrays_of(store):
            if array.dtype not in DTYPES:
                raise OptionError(
                    f"save_pretrained: expected {name} of a dtype of {', '.join(DTYPES.values())}, got {array.dtype}; use "
                    "copy.deepcopy for a cache of this model"
                )
            self.stores[f"layers.{layer.layer_idx}.{name}"] = store, array, name
        return entry

    def _other(self, index: int, layer: Any) -> Layer:
        if is_placeholder(layer):
            return OtherLayer(type(layer).__name__)
        numbers, tensors = contents(index, layer)
        self.tensors |= {f"layers.{index}.{name}": tensor for name, tensor in tensors.items()}
        shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        return OtherLayer(type(layer).__name__, numbers, shapes)

    def wait_for_kernels(self) -> None:
        """Wait for what writes to the contents, on any stream. Then threads with other streams may read them."""
        held = [array.compute_device for _, array, _ in self.stores.values()]
        held += [tensor.device for tensor in self.tensors.values()]
        for device in {device for device in held if device.type == "cuda"}:
            wait_for_device(device)

    def pieces(self, part: Part, staging: Staging) -> Iterator[list[memoryview]]:
        """The bytes of each piece of a part, in one or several buffers, valid until the next piece.

        Several threads may call this, each with its own `staging`.
        """
        if part.spec.name in self.tensors:
            for piece in _tensor_pieces(self.tensors[part.spec.name], part):
                yield [bytes_of(piece.contiguous())]
            return
        store, array, name = self.stores[part.spec.name]
        for first, stop in part.piece_rows():
            yield self._rows(store, array, name, first, stop, staging)

    def _rows(
        self, store: PageStore, array: ChunkedArray, name: str, first: int, stop: int, staging: Staging
    ) -> list[memoryview]:
        """Rows of an array, by their numbers in the files. Places without a token are zero.

        Pages in host memory are not copied, unless a place is without a token.
        """
        pages = pages_per_row(store, name)
        places = SEGMENT_PAGES // pages
        each = store.num_heads * places
        full, rest = divmod(store.length, store.page_size)
        full = -(-full // pages)
        if name in ("shifts", "partition"):
            full, rest = self.sequences.spans.num_pages, 0
        numbers = range(first // each, -(-stop // each))
        views = [view for start, end in self._runs(numbers, each, first, stop) for view in array.views(start, end)]
        partly = [number for number in numbers if (self.places[number] + 1) * places > full]
        if not partly and in_host_memory(array.device):
            return [bytes_of(view) for view in views]
        buffer = staging.buffer((stop - first) * array.row_bytes, has_streams(array.device))
        content = buffer.view(array.dtype).view(stop - first, *array.row_shape)
        staging.gather(views, content, array.device)
        for number in partly:
            begin, end = max(first, number * each), min(stop, (number + 1) * each)
            page = self.places[number] * places + torch.arange(begin, end) % places
            inside = content[begin - first : end - first]
            if name == "pages" and rest:
                last = (page == full).nonzero().flatten()
                for field in store.backing_layout.split(inside):
                    field[last, rest:] = 0
            inside[page >= full + (name == "pages" and rest > 0)] = 0
        return [bytes_of(buffer)]

    def _runs(self, numbers: range, each: int, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """Rows [start, end) of an array that are rows [first, stop) in the files, as few runs as possible.

        Args:
            numbers: of the segments, in the files.
            each: rows of a segment.
        """
        start = end = -1
        for number in numbers:
            shift = (self.segments[number] - number) * each
            begin = max(first, number * each) + shift
            if begin != end:
                if end >= 0:
                    yield start, end
                start = begin
            end = min(stop, (number + 1) * each) + shift
        if end >= 0:
            yield start, end


def arrays_of(store: PageStore) -> Iterator[tuple[str, ChunkedArray]]:
    """Names and arrays of a layer, in the order of the files."""
    yield "pages", store.backing
    for name, summary in store.summaries.items():
        for array, end in zip(summary.arrays, ("", ".scale"), strict=False):
            yield f"summary.{name}{end}", array
    if store.permutation is not None:
        yield from zip(("shifts", "partition"), store.permutation.arrays, strict=False)


def pages_per_row(store: PageStore, name: str) -> int:
    """Pages that have one row of an array of `arrays_of`."""
    kind, _, rest = name.partition(".")
    return store.summaries[rest.removesuffix(".scale")].pages_per_row if kind == "summary" else 1


def _tensor_pieces(tensor: Tensor, part: Part) -> Iterator[Tensor]:
    """Pieces of a part of a tensor. A large tensor that is not contiguous is gathered piece by piece, not copied at once."""
    source = tensor.detach()
    flat = source.reshape(-1) if source.is_contiguous() or source.nbytes <= PIECE_BYTES else None
    for first, stop in part.piece_rows():
        if flat is not None:
            yield flat[first:stop].cpu()
        else:
            where = torch.arange(first, stop, device=source.device)
            yield source[torch.unravel_index(where, source.shape)].cpu()
