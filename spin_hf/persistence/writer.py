"""`SpinCache.save_pretrained`: writes a cache's contents, in pieces.

stale summaries, pending clusters  ->  computed first, as the next step would do
segments in use                    ->  renumbered in the order of sequences, each written once
places without a token             ->  zeros, so that no unrelated memory gets into a file
everything else                    ->  as it is stored, in either tier
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from ..config import MOST_BYTES, parse_bytes
from ..errors import OptionError, OptionTypeError, SavedCacheError
from ..indexing import cluster
from ..integration.layer_types import is_placeholder, layers_with_contents
from ..state import CacheState, LayerState
from ..storage.chunked_array import ChunkedArray
from ..storage.page_store import PageStore
from ..storage.page_table import SEGMENT_PAGES
from . import files
from .fingerprint import fingerprint, tokens_hash
from .manifest import FILE_NAME, MOST_SEQUENCES, OPTIONS, Layer, Manifest, OtherLayer, PagedLayer, pages_dtype
from .other_layers import contents
from .shards import DTYPES, PIECE_BYTES, Part, Shard, bytes_of, cut, piece_checksum
from .strict_json import RefusedError


def save(
    directory: Any, state: CacheState, layers: list[Any], config: Any, model: Any, length: int, batch_size: int | None,
    tokens: Any, max_shard_bytes: int | str,
) -> None:  # fmt: skip
    """Write what a cache holds to a folder. A saved cache in it is replaced, in one step at the end.

    Args:
        directory: the folder; made if it does not exist.
        state, layers, config: of the cache; no forward is in progress.
        model: the model, if it is known.
        length, batch_size: what the cache holds.
        tokens: token ids [B, >= length], to be saved too; None for none.
        max_shard_bytes: tensor bytes of a file, as a cap on memory; "auto" for no limit.
    Raises:
        OptionTypeError, OptionError: an argument, or the cache holds nothing that can be saved.
        SavedCacheError: a file could not be written. A saved cache that was there is as before.
    """
    folder = files.folder_path(directory)
    if not length or not batch_size:
        raise OptionError(
            "save_pretrained: expected a cache that holds tokens, got none or states of linear attention only; call the model"
        )
    if batch_size > MOST_SEQUENCES:
        raise OptionError(
            f"save_pretrained: expected at most {MOST_SEQUENCES} sequences, got {batch_size}; use "
            "batch_select_indices on copies of the cache, and save each"
        )
    ids = _checked_tokens(tokens, batch_size, length)
    most = parse_bytes("max_shard_bytes", max_shard_bytes) or MOST_BYTES
    if state.committed:
        cluster.cluster_new_tokens(state)
    source = _Contents(state, layers_with_contents(layers), config, model, length, batch_size, ids, most)
    try:
        new = not folder.is_dir()
        os.makedirs(folder, exist_ok=True)
        if new:
            files.sync_folder(folder.absolute().parent)
        with files.locked(folder):
            _write(folder, source)
    except RefusedError as error:
        raise OptionError(
            f"max_shard_bytes: expected {error.args[0]}, got {most} bytes for each; raise max_shard_bytes"
        ) from error
    except OSError as error:
        raise SavedCacheError(
            f"save_pretrained: expected to write a saved cache to {folder}, got {error}; make room, or use another folder"
        ) from error


def _checked_tokens(tokens: Any, batch_size: int, length: int) -> Tensor | None:
    if tokens is None:
        return None
    try:
        ids = torch.as_tensor(tokens).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionTypeError(f"tokens: expected token ids, got {type(tokens).__name__}; pass input_ids") from error
    ids = ids.unsqueeze(0) if ids.dim() == 1 else ids
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if not whole or ids.dim() != 2 or ids.shape[0] != batch_size or ids.shape[1] < length:
        raise OptionError(
            f"tokens: expected the ids of the tokens that the cache holds, [{batch_size}, {length}], got "
            f"{list(ids.shape)} of {ids.dtype}; pass the input_ids, and the new tokens behind them"
        )
    return ids[:, :length].long().contiguous()


def _write(folder: Path, source: _Contents) -> None:
    """Write shards, then switch to them. On an error the new files are removed."""
    manifest, written = source.manifest, list[str]()
    shards = cut(manifest.specs(source.state.method, source.state.options), manifest.max_shard_bytes, manifest.save_id)
    try:
        for shard in shards:
            written.append(shard.name)
            digest = hashlib.sha256(shard.header)
            files.create(folder / shard.name, partial(_fill, shard, source, digest))
            manifest.shards.append((shard.name, shard.num_bytes, digest.hexdigest()))
        files.switch(folder, FILE_NAME, manifest.text())
    except BaseException:
        if not _is_current(folder, manifest.save_id):
            for name in written:
                with suppress(OSError):
                    os.unlink(folder / name)
        raise
    files.remove_others(folder, written)


def _is_current(folder: Path, save_id: str) -> bool:
    """Whether the folder's JSON names the shards of this save: an error may arrive after the switch."""
    try:
        return save_id in (folder / FILE_NAME).read_text("utf-8")
    except FileNotFoundError:
        return False
    except (OSError, UnicodeDecodeError):
        return True  # unknown: shards without a manifest are harmless, a manifest without its shards is not


def _fill(shard: Shard, source: _Contents, digest: Any, descriptor: int) -> None:
    """Write a shard, and add the checksums of its pieces to `digest`."""
    files.write_all(descriptor, shard.header)
    for part in shard.parts:
        for piece, (begin, end) in zip(source.pieces(part), part.pieces(), strict=True):
            content = bytes_of(piece.contiguous())
            assert content.nbytes == end - begin
            digest.update(piece_checksum([content]))
            files.write_all(descriptor, content)


class _Contents:
    """A cache as tensors and a manifest."""

    def __init__(
        self, state: CacheState, layers: list[Any], config: Any, model: Any, length: int, batch_size: int,
        tokens: Tensor | None, max_shard_bytes: int,
    ) -> None:  # fmt: skip
        self.state, self.sequences = state, state.sequences
        found: dict[int, int] = {}  # segment -> index in its sequences
        for row in self.sequences.directory:
            for index, segment in enumerate(row):
                found.setdefault(segment, index)
        self.segments, self.places = (torch.tensor([*held], dtype=torch.int64) for held in (found, found.values()))
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
            layer.clustered_pages,
        )  # fmt: skip
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

    def pieces(self, part: Part) -> Iterator[Tensor]:
        """The content of each piece of a part, on the CPU."""
        if part.spec.name in self.tensors:
            yield from _tensor_pieces(self.tensors[part.spec.name], part)
            return
        store, array, name = self.stores[part.spec.name]
        for first, stop in part.piece_rows():
            yield self._rows(store, array, name, torch.arange(first, stop))

    def _rows(self, store: PageStore, array: ChunkedArray, name: str, rows: Tensor) -> Tensor:
        """Rows of an array, by their numbers in the files. Places without a token are zero."""
        each = store.num_heads * SEGMENT_PAGES
        segment, inside = rows // each, rows % each
        content = array.take(self.segments[segment] * each + inside)
        page = self.places[segment] * SEGMENT_PAGES + inside % SEGMENT_PAGES
        full, rest = divmod(store.length, store.page_size)
        if name in ("shifts", "partition"):
            full = self.sequences.spans.num_pages
        elif name == "pages" and rest:
            last = (page == full).nonzero().flatten()
            for field in store.backing_layout.split(content):
                field[last, rest:] = 0
            full += 1
        content[page >= full] = 0
        return content


def arrays_of(store: PageStore) -> Iterator[tuple[str, ChunkedArray]]:
    """Names and arrays of a layer, in the order of the files."""
    yield "pages", store.backing
    for name, summary in store.summaries.items():
        for array, end in zip(summary.arrays, ("", ".scale"), strict=False):
            yield f"summary.{name}{end}", array
    if store.permutation is not None:
        yield from zip(("shifts", "partition"), store.permutation.arrays, strict=False)


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
