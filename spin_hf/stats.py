"""What a cache holds and what its steps cost: the counters behind `SpinCache.stats()`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from .state import CacheState


@dataclass(frozen=True)
class CacheStats:
    """A snapshot of a cache. `str()` prints it as a table.

    Attributes:
        sequences: sequences held.
        tokens: tokens held by each of them, padding included.
        pages: pages held, over all sequences, KV heads and paged layers; shared pages count once.
        gpu_bytes: pages, page frames and summaries in the compute tier (RAM on a machine without a GPU).
        cpu_bytes: pages in the cpu tier; 0 while everything fits the compute tier.
        metadata_bytes: directories and tables, the sum of `metadata`.
        metadata: bytes by table, zeros included: directory and reference counts of the sequences; their padding and positions,
            where there is padding; which page is in which page frame (page_slot, slot_page, slot_step), where pages live in
            the cpu tier; which pages and tokens were clustered; addresses of the chunks that kernels read. What a step makes
            of them for itself is not counted.
        mandatory_frames: page frames, over all sequences, KV heads and layers, that hold what one step reads; 0 while all pages
            are in the compute tier.
        buffer_frames: page frames beside these: pages kept for later steps. They are what is given back under pressure.
        loads: pages loaded from the cpu tier so far.
        evictions: resident pages that made room for others so far.
        hit_rate: share of the pages that steps needed and found resident; 1.0 where nothing was ever paged.
        attended_tokens: mean over all sparse queries so far: tokens attended to per KV head; nan before the first one.
        sparse_queries: queries, counted per sequence and KV head, that selected pages; on a GPU also those of short calls
            that found everything within their budget.
        paged_layers: layers that select pages.
        dense_layers: reason -> number of layers that the cache keeps as transformers does, whole or by their window.
    """

    sequences: int
    tokens: int
    pages: int
    gpu_bytes: int
    cpu_bytes: int
    metadata_bytes: int
    metadata: Mapping[str, int]
    mandatory_frames: int
    buffer_frames: int
    loads: int
    evictions: int
    hit_rate: float
    attended_tokens: float
    sparse_queries: int
    paged_layers: int
    dense_layers: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return table("SpinCache", {item.name: getattr(self, item.name) for item in fields(self)})


def table(title: str, values: Mapping[str, object]) -> str:
    """Names and values in two columns under a title.

    Args:
        values: by name; None is no limit; what ends in "bytes" or "memory" is printed as a size, and so are the values of a
            mapping whose name ends in "data" or "parts", zeros left out.
    """
    width = max(map(len, values))
    rows = (f"  {name.replace('_', ' '):<{width}}  {_show(name, value)}" for name, value in values.items())
    return "\n".join([title, *rows])


def size(number: int) -> str:
    """A number of bytes as people read it: `312 B`, `1.5 KiB`, `87.3 MiB`, `1,024.0 GiB`."""
    for unit, exponent in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if number >= 1 << exponent:
            return f"{number / 2**exponent:,.1f} {unit}"
    return f"{number} B"


def _show(name: str, value: object) -> str:
    if isinstance(value, Mapping):
        if name.endswith(("data", "parts")):
            return ", ".join(f"{part} {size(number)}" for part, number in value.items() if number) or "none"
        return ", ".join(f"{count} ({reason})" for reason, count in value.items()) or "none"
    if value is None or isinstance(value, bool):
        return {None: "no limit", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return size(value) if name.endswith(("bytes", "memory")) else f"{value:,}"
    if isinstance(value, float):
        return f"{value:.1%}" if name == "hit_rate" else f"{value:,.1f}"
    return str(value)


def stats_of(state: CacheState, counted: dict[str, int], tokens: int, dense_reasons: dict[str, int]) -> CacheStats:
    """What a cache holds and what its steps did so far. Reads the device.

    Args:
        counted: by the kernels, by the names of `Counter`.
        tokens: of each sequence.
        dense_reasons: why layers are not paged, and how many.
    """
    stores = [layer.store for layer in state.layers if layer.store is not None]
    frames = [store.frames for store in stores if store.frames is not None]
    loads, hits = sum(f.loads for f in frames) + counted["LOADS"], sum(f.hits for f in frames) + counted["HITS"]
    queries = sum(layer.attended_queries for layer in state.layers) + counted["QUERIES"]
    attended = sum(layer.attended_tokens for layer in state.layers) + counted["TOKENS"]
    segments, mandatory = state.sequences.segments_in_use, sum(store.mandatory_frames for store in stores)
    metadata = Counter(state.sequences.metadata)
    for store in stores:
        metadata.update(store.metadata(segments))
    return CacheStats(
        sequences=state.sequences.batch_size,
        tokens=tokens,
        pages=sum(store.pages_held() for store in stores),
        gpu_bytes=sum(store.gpu_bytes(segments) for store in stores),
        cpu_bytes=sum(store.cpu_bytes(segments) for store in stores),
        metadata_bytes=metadata.total(),
        metadata=dict(metadata),
        mandatory_frames=mandatory,
        buffer_frames=sum(f.frames.shape[0] for f in frames) - mandatory,
        loads=loads,
        evictions=sum(f.evictions for f in frames) + counted["EVICTIONS"],
        hit_rate=hits / (hits + loads) if hits + loads else 1.0,
        attended_tokens=attended / queries if queries else float("nan"),
        sparse_queries=queries,
        paged_layers=len(state.layers),
        dense_layers=dict(dense_reasons),
    )
