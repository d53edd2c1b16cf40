"""`spin_cache.json`: what a saved cache holds, and how the tensors in its shards are named and shaped.

    fingerprint   model, method and options that decide keys, values and summaries (`fingerprint.py`)
    options       of the cache that was saved; the defaults of `from_pretrained`
    layers        kind "pages": heads, sizes, dtype, layout;  "unused": no tokens yet;  else the class of transformers' layer
    shards        name, size and digest of each file
    checksum      SHA-256 of all the rest

`parse_manifest` refuses everything that `Manifest.text` does not write.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..attention.methods.base import Method
from ..attention.methods.clustering import ClusteringMethod
from ..config import MOST_BYTES, MOST_TOKENS, SpinOptions, shown
from ..storage.page_layout import PageLayout, page_layouts
from ..storage.page_table import SEGMENT_PAGES, segments_of
from ..storage.summary_array import stored_as
from .shards import DTYPE_OF, DTYPES, MOST_SHARDS, TensorSpec
from .strict_json import Fields, RefusedError, parse

FILE_NAME = "spin_cache.json"
FORMAT = "spin_hf saved cache"
VERSION = 3
MOST_FILE_BYTES = 16 << 20
MOST_SEQUENCES = 4096
_MOST_LAYERS = 10_000
_MOST_DIM = 1 << 20
PAGES, UNUSED = "pages", "unused"
OPTIONS = ("budget", "num_sink_tokens", "recent_window", "dense_below", "summary_dtype", "cpu_dtype")


@dataclass(frozen=True)
class PagedLayer:
    """A paged layer.

    Attributes:
        int8: whether its pages are int8.
        length: tokens written; fewer than the cache's if forwards skipped the layer.
        clustered_pages: pages of each sequence that are clustered.
        fitted: whether there are tensors that the method fitted.
    """

    num_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    int8: bool
    length: int
    clustered_pages: int
    fitted: bool = False

    def with_heads(self, num_heads: int) -> PagedLayer:
        """The same layer with another number of heads."""
        return replace(self, num_heads=num_heads)

    def layout(self, page_size: int) -> PageLayout:
        """Layout of its pages in the files."""
        return page_layouts(page_size, self.key_dim, self.value_dim, self.dtype, self.int8)[int(self.int8)]


@dataclass(frozen=True)
class OtherLayer:
    """A layer of transformers' own.

    Attributes:
        kind: name of its class.
        numbers: attribute -> int, bool or None. Entries of a dict attribute are named `conv_states.0`.
        tensors: attribute -> dtype and shape.
    """

    kind: str
    numbers: dict[str, int | bool | None] = field(default_factory=dict)
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)


Layer = PagedLayer | OtherLayer | None
"""None: a paged layer without tokens."""


def pages_dtype(layers: list[Layer]) -> torch.dtype | None:
    """Dtype of the first paged layer; None without one."""
    return next((layer.dtype for layer in layers if isinstance(layer, PagedLayer)), None)


@dataclass(frozen=True)
class Manifest:
    """What a saved cache holds.

    Attributes:
        save_id: 12 hexadecimal digits in the names and headers of its shards.
        num_segments: segments in the files. Sequences may share them.
        padded, positions: whether there is a padding mask, and a table of positions.
        span_stops: of clustered spans.
        tokens: SHA-256 of the token ids; None if they were not saved.
        shards: (name, size, digest) of each file.
    """

    save_id: str
    fingerprint: dict[str, Any]
    options: dict[str, Any]
    batch_size: int
    length: int
    page_size: int
    num_segments: int
    padded: bool
    positions: bool
    span_stops: list[int]
    tokens: str | None
    layers: list[Layer]
    max_shard_bytes: int
    versions: dict[str, str]
    shards: list[tuple[str, int, str]] = field(default_factory=list)

    @property
    def segments_per_sequence(self) -> int:
        """Length of a row of the directory; 0 without paged layers."""
        return segments_of(-(-self.length // self.page_size)) if self.num_segments else 0

    def specs(self, method: Method, options: SpinOptions) -> list[TensorSpec]:
        """All tensors in the order of the files."""
        batch, length = self.batch_size, self.length
        found = []
        if self.tokens is not None:
            found.append(TensorSpec("tokens", torch.int64, (batch, length)))
        if self.num_segments:
            found.append(TensorSpec("directory", torch.int32, (batch, self.segments_per_sequence)))
        if self.padded:
            found.append(TensorSpec("valid", torch.bool, (batch, length)))
        if self.positions:
            found.append(TensorSpec("positions", torch.int64, (batch, length)))
        if self.span_stops:
            found.append(TensorSpec("clustered", torch.bool, (batch, self.span_stops[-1])))
        for index, layer in enumerate(self.layers):
            if isinstance(layer, PagedLayer):
                found += self._page_specs(index, layer, method, options)
            elif layer is not None:
                found += [TensorSpec(f"layers.{index}.{name}", *of_tensor) for name, of_tensor in layer.tensors.items()]
        return found

    def _page_specs(self, index: int, layer: PagedLayer, method: Method, options: SpinOptions) -> list[TensorSpec]:
        """Tensors of a paged layer, in the order of `arrays_of`."""
        layout, dtype = layer.layout(self.page_size), layer.dtype
        rows: list[tuple[str, torch.dtype, tuple[int, ...], int]] = [
            ("pages", layout.row_dtype, (layout.row_elements,), 1)
        ]
        for name, shape in method.summary_shapes(layer.key_dim, layer.value_dim).items():
            stored, int8 = stored_as(name, dtype, options.quantizes(dtype.itemsize), method.summary_dtypes())
            int8 = int8 and bool(shape)
            pages = method.pages_per_row.get(name, 1)
            rows.append((f"summary.{name}", torch.int8 if int8 else stored, shape, pages))
            if int8:
                rows.append((f"summary.{name}.scale", torch.float32, (), pages))
        if isinstance(method, ClusteringMethod):
            rows.append(("shifts", torch.int16, (self.page_size,), 1))
            if method.multi_page_clusters:
                rows.append(("partition", torch.int16, (), 1))
        before = self.num_segments, layer.num_heads
        fitted = self.fitted_specs(index, layer, method) if layer.fitted else {}
        return [
            TensorSpec(
                f"layers.{index}.{name}", kind, (*before, SEGMENT_PAGES // pages, *shape), torch.Size(shape).numel()
            )
            for name, kind, shape, pages in rows
        ] + list(fitted.values())

    def fitted_specs(self, index: int, layer: PagedLayer, method: Method) -> dict[str, TensorSpec]:
        """Tensors that the method fitted to the sequences, by their names in `Method.fitted_shapes`."""
        each, own = (self.batch_size, layer.num_heads), method.fitted_dtypes()
        return {
            name: TensorSpec(f"layers.{index}.fitted.{name}", own.get(name, torch.float32), (*each, *shape))
            for name, shape in method.fitted_shapes(layer.key_dim, layer.value_dim).items()
        }

    def text(self) -> bytes:
        """The JSON."""
        content: dict[str, Any] = {
            "format": FORMAT, "version": VERSION, "versions": self.versions, "id": self.save_id,
            "fingerprint": self.fingerprint, "options": self.options, "sequences": self.batch_size,
            "tokens_held": self.length, "page_size": self.page_size, "segments": self.num_segments,
            "padding": self.padded, "positions": self.positions, "spans": self.span_stops, "tokens": self.tokens,
            "layers": [_layer_json(layer) for layer in self.layers], "max_shard_bytes": self.max_shard_bytes,
            "shards": [{"name": name, "bytes": size, "sha256": digest} for name, size, digest in self.shards],
        }  # fmt: skip
        return json.dumps({**content, "checksum": _checksum(content)}, indent=1).encode()


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _layer_json(layer: Layer) -> dict[str, Any]:
    if layer is None:
        return {"kind": UNUSED}
    if isinstance(layer, PagedLayer):
        fitted = {"fitted": True} if layer.fitted else {}
        return fitted | {
            "kind": PAGES, "heads": layer.num_heads, "key_dim": layer.key_dim, "value_dim": layer.value_dim,
            "dtype": DTYPES[layer.dtype], "int8": layer.int8, "tokens": layer.length, "clustered": layer.clustered_pages,
        }  # fmt: skip
    tensors = {name: {"dtype": DTYPES[dtype], "shape": list(shape)} for name, (dtype, shape) in layer.tensors.items()}
    return {"kind": layer.kind, "numbers": layer.numbers, "tensors": tensors}


def parse_manifest(text: bytes) -> Manifest:
    """The manifest in a JSON text.

    Raises:
        RefusedError: it is damaged or hostile, or of another version.
    """
    content = parse(text)
    if content.get("format") != FORMAT:
        raise RefusedError(f"'format' {FORMAT!r}", shown(content.get("format"), 80))
    if content.get("version") != VERSION or type(content["version"]) is not int:
        raise RefusedError(f"version {VERSION} of the format", shown(content.get("version"), 80), "save it again")
    fields = Fields(content, FILE_NAME)
    checksum = fields.hexadecimal("checksum", 64)
    if checksum != _checksum({name: value for name, value in content.items() if name != "checksum"}):
        raise RefusedError("content that its checksum belongs to", "other content")
    for name in ("format", "version"):
        fields.take(name, str, int)
    versions = fields.take("versions", dict)
    if len(versions) > 8 or not all(isinstance(version, str) and len(version) < 100 for version in versions.values()):
        raise RefusedError("'versions' as texts", shown(versions, 80))
    has_tokens = content.get("tokens") is not None
    tokens = fields.hexadecimal("tokens", 64) if has_tokens else fields.take("tokens", type(None))
    made = Manifest(
        save_id=fields.hexadecimal("id", 12), fingerprint=fields.take("fingerprint", dict),
        options=fields.take("options", dict), batch_size=fields.count("sequences", MOST_SEQUENCES, 1),
        length=fields.count("tokens_held", MOST_TOKENS, 1), page_size=fields.count("page_size", 1 << 15, 1),
        num_segments=fields.count("segments", MOST_TOKENS), padded=fields.flag("padding"),
        positions=fields.flag("positions"), span_stops=fields.counts("spans", MOST_TOKENS, 1 << 20), tokens=tokens,
        layers=[_layer(layer, index) for index, layer in enumerate(fields.take("layers", list))],
        max_shard_bytes=fields.count("max_shard_bytes", MOST_BYTES, 1), versions=versions,
        shards=[_shard(shard) for shard in fields.take("shards", list)],
    )  # fmt: skip
    fields.done()
    _check(made)
    return made


def _layer(given: Any, index: int) -> Layer:
    if index >= _MOST_LAYERS:
        raise RefusedError(f"at most {_MOST_LAYERS} layers", "more")
    fields = Fields(given, f"layer {index}")
    kind = fields.text("kind")
    layer: Layer = None
    if kind == PAGES:
        heads, key_dim, value_dim = (fields.count(name, _MOST_DIM, 1) for name in ("heads", "key_dim", "value_dim"))
        layer = PagedLayer(
            heads, key_dim, value_dim, _dtype(fields), fields.flag("int8"), fields.count("tokens", MOST_TOKENS),
            fields.count("clustered", MOST_TOKENS), "fitted" in given,
        )  # fmt: skip
        if layer.fitted and not fields.flag("fitted"):
            raise RefusedError(f"'fitted' in layer {index} only if it is true", "false")
        if not layer.dtype.is_floating_point:
            raise RefusedError(f"keys of a floating-point dtype in layer {index}", str(layer.dtype))
    elif kind != UNUSED:
        numbers, tensors = fields.take("numbers", dict), {}
        for name, number in numbers.items():
            if type(number) not in (int, bool, type(None)) or not -1 <= (number or 0) <= MOST_TOKENS:
                raise RefusedError(f"{shown(name, 80)} of layer {index} as a number", shown(number, 80))
        for name, about in fields.take("tensors", dict).items():
            entry = Fields(about, f"{shown(name, 80)} of layer {index}")
            tensors[name] = _dtype(entry), tuple(entry.counts("shape", MOST_BYTES, 8))
            entry.done()
        layer = OtherLayer(kind, numbers, tensors)
    fields.done()
    return layer


def _dtype(fields: Fields) -> torch.dtype:
    name = fields.text("dtype")
    if name not in DTYPE_OF:
        raise RefusedError(f"a dtype of {', '.join(DTYPE_OF)} in {fields.where}", shown(name, 80))
    return DTYPE_OF[name]


def _shard(given: Any) -> tuple[str, int, str]:
    fields = Fields(given, "a shard")
    made = fields.text("name"), fields.count("bytes", MOST_BYTES), fields.hexadecimal("sha256", 64)
    fields.done()
    return made


def _check(made: Manifest) -> None:
    """Refuse numbers that contradict each other."""
    paged = [layer for layer in made.layers if isinstance(layer, PagedLayer)]
    if bool(paged) != bool(made.num_segments):
        raise RefusedError("segments if and only if there are pages", f"{made.num_segments} segments")
    each = segments_of(-(-made.length // made.page_size))
    if paged and not each <= made.num_segments <= each * made.batch_size:
        raise RefusedError(f"{each} to {each * made.batch_size} segments", f"{made.num_segments}")
    if not 1 <= len(made.shards) <= MOST_SHARDS:
        raise RefusedError(f"1 to {MOST_SHARDS} shards", f"{len(made.shards)}")
    stops = made.span_stops
    ascending = all(first < stop for first, stop in zip([0, *stops], stops, strict=False))
    if not ascending or (stops and (not paged or stops[-1] * made.page_size > made.length)):
        raise RefusedError("spans that ascend and end within the tokens", shown(stops, 80))
    for layer in paged:
        if layer.length > made.length or layer.clustered_pages not in (0, *stops):
            raise RefusedError(
                f"at most {made.length} tokens in a layer, and clusters up to a span's end", shown(layer)
            )
    if (made.padded or made.positions) and not paged:
        raise RefusedError("no padding and positions without pages", "some")
