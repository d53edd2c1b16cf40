"""Memory held by a cache and counters of its steps: the result of `SpinCache.stats()`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from .integration.rank_agreement import Ranks
from .state import CacheState


@dataclass(frozen=True)
class CacheStats:
    """A snapshot of a cache. `print` shows it as a table.

    Attributes:
        sequences: sequences held.
        tokens: tokens per sequence, including padding.
        pages: pages over all sequences, KV heads and paged layers. Shared pages count once.
        gpu_bytes: pages, page frames and summaries in the compute tier (RAM on a machine without a GPU). Pages that forks share
            count in each of them.
        cpu_bytes: pages in the cpu tier, counted likewise; 0 while everything fits the compute tier.
        metadata_bytes: sum of `metadata`.
        metadata: table -> bytes, including zeros. Page directory and reference counts; padding and positions, if there is
            padding; page frame tables (page_slot, slot_page, slot_step), if pages live in the cpu tier; clustered pages and
            tokens; tensors that the method fits to sequences, also before the fit; chunk addresses for kernels. Temporary
            buffers of a step are not counted.
        mandatory_frames: page frames for the pages that one step reads, over all sequences, KV heads and layers; 0 while all
            pages are in the compute tier.
        buffer_frames: further page frames, which hold pages for later steps. They are freed under memory pressure.
        loads: pages loaded from the cpu tier.
        evictions: resident pages replaced by others.
        hit_rate: fraction of the pages read by steps that were resident; 1.0 while all pages are in the compute tier.
        attended_tokens: tokens attended to per KV head, mean over all sparse queries; nan before the first one.
        sparse_queries: queries that selected pages, counted per sequence and KV head. On a GPU also queries of short calls
            for which the budget covered all tokens.
        reused_tokens: tokens of the present sequences that a `PromptStore` has restored instead of the model reading them.
        paged_layers: layers that select pages.
        dense_layers: reason -> number of layers with transformers' own cache layer (full or sliding window).
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
    reused_tokens: int
    paged_layers: int
    dense_layers: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return table("SpinCache", {item.name: getattr(self, item.name) for item in fields(self)})


def table(title: str, values: Mapping[str, object]) -> str:
    """Names and values in two columns under a title.

    Args:
        values: name -> value. None prints as "no limit". Names that end in "bytes" or "memory" print as sizes. A mapping
            with a name that ends in "data" or "parts" prints its nonzero values as sizes.
    """
    width = max(map(len, values))
    rows = (f"  {name.replace('_', ' '):<{width}}  {_show(name, value)}" for name, value in values.items())
    return "\n".join([title, *rows])


def size(number: int) -> str:
    """A number of bytes with a unit: `312 B`, `1.5 KiB`, `87.3 MiB`, `1,024.0 GiB`."""
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


def stats_of(
    state: CacheState, counted: dict[str, int], tokens: int, dense_reasons: dict[str, int], ranks: Ranks | None = None
) -> CacheStats:  # fmt: skip
    """Snapshot of a cache. Reads the device.

    Args:
        counted: kernel counters, by the names of `Counter`.
        tokens: per sequence.
        dense_reasons: why layers are not paged -> how many.
        ranks: whose numbers are summed; None for this rank's alone.
    """
    own = _counted_on_rank(state, counted)
    found = [own] if ranks is None else ranks.gathered("read stats of all ranks", own)
    sums, metadata = Counter[str](), Counter[str]()
    for numbers, tables in found:
        sums.update(numbers)
        metadata.update(tables)
    loads, queries = sums["loads"], sums["queries"]
    reads = sums["hits"] + loads
    return CacheStats(
        sequences=state.sequences.batch_size, tokens=tokens, pages=sums["pages"], gpu_bytes=sums["gpu"],
        cpu_bytes=sums["cpu"], metadata_bytes=metadata.total(), metadata=dict(metadata), mandatory_frames=sums["mandatory"],
        buffer_frames=sums["frames"] - sums["mandatory"], loads=loads, evictions=sums["evictions"],
        hit_rate=sums["hits"] / reads if reads else 1.0,
        attended_tokens=sums["attended"] / queries if queries else float("nan"), sparse_queries=queries,
        reused_tokens=state.reused_tokens, paged_layers=len(state.layers), dense_layers=dict(dense_reasons),
    )  # fmt: skip


def _counted_on_rank(state: CacheState, counted: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Numbers of this rank's heads, and bytes of its tables."""
    stores = [layer.store for layer in state.layers if layer.store is not None]
    frames = [store.frames for store in stores if store.frames is not None]
    segments, metadata = state.sequences.segments_in_use, Counter(state.sequences.metadata)
    for store in stores:
        metadata.update(store.metadata(segments))
        metadata["fitted tensors"] += state.sequences.batch_size * store.num_heads * store.budget.sequence_bytes
    numbers = {
        "pages": sum(store.pages_held() for store in stores), "gpu": sum(store.gpu_bytes(segments) for store in stores),
        "cpu": sum(store.cpu_bytes(segments) for store in stores),
        "mandatory": sum(store.mandatory_frames for store in stores),
        "frames": sum(each.frames.shape[0] for each in frames),
        "loads": sum(each.loads for each in frames) + counted["LOADS"],
        "hits": sum(each.hits for each in frames) + counted["HITS"],
        "evictions": sum(each.evictions for each in frames) + counted["EVICTIONS"],
        "queries": sum(layer.attended_queries for layer in state.layers) + counted["QUERIES"],
        "attended": sum(layer.attended_tokens for layer in state.layers) + counted["TOKENS"],
    }  # fmt: skip
    return numbers, metadata
