"""What `SpinCache.stats()` says, counted over the layers of a cache."""

from __future__ import annotations

from collections import Counter

from .state import SharedState
from .stats import CacheStats


def stats_of(shared: SharedState, tokens: int, dense_reasons: dict[str, int]) -> CacheStats:
    """What a cache holds and what its steps did so far. Reads the device.

    Args:
        tokens: of each sequence.
        dense_reasons: why layers are not paged, and how many.
    """
    stores = [layer.store for layer in shared.layers if layer.store is not None]
    frames = [store.frames for store in stores if store.frames is not None]
    counted = shared.counted()
    loads, hits = sum(f.loads for f in frames) + counted["LOADS"], sum(f.hits for f in frames) + counted["HITS"]
    queries = sum(layer.attended_queries for layer in shared.layers) + counted["QUERIES"]
    attended = sum(layer.attended_tokens for layer in shared.layers) + counted["TOKENS"]
    segments, mandatory = shared.sequences.segments_in_use, sum(store.mandatory_frames for store in stores)
    metadata = Counter(shared.sequences.metadata)
    for store in stores:
        metadata.update(store.metadata(segments))
    return CacheStats(
        sequences=shared.sequences.batch_size,
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
        paged_layers=len(shared.layers),
        dense_layers=dict(dense_reasons),
    )
