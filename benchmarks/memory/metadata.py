"""Bytes of tables beside the keys and values, against a flat layout for the longest context:
`python -m benchmarks.memory.metadata`.

--tokens 32768        held by each sequence
--share 0.25          `gpu_memory` of the rows whose pages live in the cpu tier, as a share of the keys and values; twice that
                      for `bisection`, whose summaries alone take a quarter
--output FILE         where to write (default: benchmarks/results/metadata.json)

held    what `stats()` of a cache of the Llama-3.1-8B shape reports after room was made for all tokens of all layers. Its
        compute tier is on torch's meta device, and host memory is not written, so that it fits any machine. The tables are
        those that a GPU would have, to the byte, with the addresses of chunks (32 KiB an array, however much it holds)
flat    one int32 for each page of each sequence, KV head and layer up to `max_position_embeddings`; where pages live in the
        cpu tier, a page number (int32) and a time (int64) for each page frame, as SpinCache has; where a method clusters
        tokens, how far they moved and partitions (int16), as SpinCache has, for each of these pages
"""

from __future__ import annotations

import argparse
import copy
import resource
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.record import RESULTS, fingerprint
from benchmarks.common.rows_file import Rows, command_line
from benchmarks.common.shapes import SHAPES
from spin_hf import CacheStats, SpinCache, plan
from spin_hf.attention.methods.registry import METHODS
from spin_hf.memory.layer_budget import clustering_bytes
from spin_hf.stats import size

SEQUENCES = (1, 2, 4, 8, 16, 32, 64)
LONGEST = 131072
"""`max_position_embeddings` of Llama-3.1-8B."""
_DTYPE = torch.bfloat16
_ADDRESSES = "address tables"


def config() -> Any:
    """Llama-3.1-8B's."""
    made = copy.deepcopy(SHAPES["llama-8b"])
    made.max_position_embeddings = LONGEST
    return made


def held(batch_size: int, tokens: int, method: str, gpu_memory: int | str) -> tuple[CacheStats, int]:
    """What a cache reports that has room for a batch, and the page frames of a layer, over all sequences and KV heads."""
    shape = config()
    cache = SpinCache(shape, method, gpu_memory=gpu_memory)
    state = cache._state
    state.sequences.begin(batch_size, tokens, None)
    state = torch.empty((batch_size, shape.num_key_value_heads, 1, shape.head_dim), dtype=_DTYPE, device="meta")
    for layer in cache.paged_layers:
        layer.lazy_initialization(state, state)
        for array in layer.store._arrays():
            _ = array.address_table  # kernels ask for it
    cache._passes.commit()
    frames = cache.paged_layers[0].store.frames
    return cache.stats(), 0 if frames is None else frames.slot_page.numel()


def flat_bytes(batch_size: int, frames: int, method: str) -> int:
    """Bytes of the flat layout's tables in all layers.

    Args:
        frames: page frames of a layer.
    """
    shape, made = config(), METHODS[method]
    of_page = sum(clustering_bytes(made()).values())
    pages = batch_size * shape.num_key_value_heads * (LONGEST // made.page_size)
    return shape.num_hidden_layers * ((4 + of_page) * pages + (4 + 8) * frames)


def measure(batch_size: int, tokens: int, method: str, gpu_memory: int | str) -> dict[str, Any]:
    """One row; raises AssertionError where `plan` says otherwise."""
    stats, frames = held(batch_size, tokens, method, gpu_memory)
    made = plan(
        config(), batch_size=batch_size, context_length=tokens, dtype=_DTYPE, method=method, gpu_memory=gpu_memory
    )
    tables = {name: number for name, number in stats.metadata.items() if number}
    planned = {**made.metadata, _ADDRESSES: tables[_ADDRESSES]}  # `plan` counts addresses where there is a GPU
    assert (tables, stats.gpu_bytes, stats.cpu_bytes) == (planned, made.gpu_bytes, made.cpu_bytes), made
    keys_and_values = made.parts["host pages"] + made.parts["pages"]
    flat = flat_bytes(batch_size, frames, method)
    return {
        "sequences": batch_size, "method": method, "gpu_memory": gpu_memory, "page_frames": made.page_frames,
        "keys_and_values_bytes": keys_and_values, "summary_bytes": made.parts["summaries"], "metadata": tables,
        "metadata_bytes": stats.metadata_bytes, "share": stats.metadata_bytes / keys_and_values, "flat_bytes": flat,
        "flat_share": flat / keys_and_values,
    }  # fmt: skip


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """The table, in Markdown."""
    head = ("sequences", "method", "pages live in", "keys and values", "tables", "share", "flat", "flat share")
    made = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in rows:
        where = "cpu tier" if row["page_frames"] else "compute tier"
        sizes = [size(row[f"{name}_bytes"]) for name in ("keys_and_values", "metadata", "flat")]
        cells = [
            str(row["sequences"]), row["method"], where, sizes[0], sizes[1], f"{row['share']:.3%}", sizes[2],
            f"{row['flat_share']:.3%}",
        ]  # fmt: skip
        made.append(f"| {' | '.join(cells)} |")
    return made


def main() -> None:
    """Measure and print all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--output", type=Path, default=RESULTS / "metadata.json")
    options = parser.parse_args()
    started = time.perf_counter()
    about = {
        "shape": "llama-8b", "max_position_embeddings": LONGEST, "tokens": options.tokens, "dtype": "bfloat16",
        "sources": fingerprint(), "versions": {name: version(name) for name in ("torch", "transformers")},
    }  # fmt: skip
    rows = Rows(options.output, about, command_line("memory.metadata", None), again=True)
    shape = config()
    sequence = (
        2 * options.tokens * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * _DTYPE.itemsize
    )
    for method in ("bisection", "shadowkv", "retroinfer"):
        for share in (None, options.share * (2 if method == "bisection" else 1)):
            for batch_size in SEQUENCES:
                cap = "auto" if share is None else int(share * batch_size * sequence)
                rows.put(f"{method}, {share or 'all'}, {batch_size}", measure(batch_size, options.tokens, method, cap))
    print("\n".join(lines(list(rows.rows.values()))))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"\n{time.perf_counter() - started:.0f} s, at most {size(peak)} of memory (torch and transformers included)")


if __name__ == "__main__":
    main()
