"""What a cache holds and what its steps cost: the counters behind `SpinCache.stats()`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class CacheStats:
    """A snapshot of a cache. `str()` prints it as a table.

    Attributes:
        sequences: sequences held.
        tokens: tokens held by each of them, padding included.
        pages: pages held, over all sequences, KV heads and paged layers; shared pages count once.
        gpu_bytes: pages, page frames and summaries in the compute tier (RAM on a machine without a GPU).
        cpu_bytes: pages in the cpu tier; 0 while everything fits the compute tier.
        metadata_bytes: directories and page tables.
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
    loads: int
    evictions: int
    hit_rate: float
    attended_tokens: float
    sparse_queries: int
    paged_layers: int
    dense_layers: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [(item.name.replace("_", " "), _show(item.name, getattr(self, item.name))) for item in fields(self)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(["SpinCache", *(f"  {name:<{width}}  {value}" for name, value in rows)])


def _show(name: str, value: object) -> str:
    if name.endswith("bytes"):
        return f"{value / 2**20:,.1f} MiB"  # type: ignore[operator]
    if name == "hit_rate":
        return f"{value:.1%}"
    if isinstance(value, float):
        return f"{value:,.1f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{count} ({reason})" for reason, count in value.items()) or "none"
    return f"{value:,}"
