"""Time of restoring a saved cache, by threads and sizes: `python -m benchmarks.speed.restore`, two minutes on a CUDA GPU.

    --tokens 65536     --threads 12 8 16     --blocks 16 8 32 (MiB)     --units 64 (MiB)     --times 2     --folder DIR

A cache of the Llama-3.1-8B shape, bf16, is saved and then restored by `SpinCache.from_pretrained`, with its files in the page
cache, for each setting with checksums and without. Each row is the fastest of `--times` runs. `plain reads` reads the same
files into buffers of a block that each thread uses again: no restore can be faster. Prints a line for each row as it comes;
`--output` writes them. `persistence/opened.py` and `persistence/staging.py` have the sizes that are used otherwise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.common.shapes import build, fill_spin
from benchmarks.common.timing import free
from benchmarks.speed import stored_prefixes
from spin_hf import SpinCache
from spin_hf.persistence import opened, staging

MIB = 1 << 20


def sizes(threads: int, block: int, unit: int) -> ExitStack:
    """A context in which files are read by these threads, in blocks and units of these MiB."""
    held = ExitStack()
    held.enter_context(patch.object(opened, "_MOST_THREADS", threads))
    held.enter_context(patch.object(opened, "_UNIT_BYTES", unit * MIB))
    held.enter_context(patch.object(staging, "BLOCK_BYTES", block * MIB))
    held.enter_context(patch.object(stored_prefixes, "THREADS", threads))
    held.enter_context(patch.object(stored_prefixes, "READ_BYTES", block * MIB))
    return held


def restored(model: Any, folder: Path, verify: bool) -> float:
    """Seconds of one restore."""
    free()
    seconds, cache = stored_prefixes.timed(lambda: SpinCache.from_pretrained(folder, model, verify=verify))
    del cache
    return seconds


def rows(model: Any, folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each setting."""
    files = sorted(folder.iterdir())
    num_bytes = sum(file.stat().st_size for file in files)
    restored(model, folder, True)  # kernels are loaded, and the files are in the page cache
    for unit, block, threads in itertools.product(options.units, options.blocks, options.threads):
        with sizes(threads, block, unit):
            ways = {
                "plain reads": lambda: float(stored_prefixes.plain_reads(files)["seconds"]),
                "verified": lambda: restored(model, folder, True),
                "not verified": lambda: restored(model, folder, False),
            }
            for name, way in ways.items():
                seconds = min(way() for _ in range(options.times))
                yield {
                    "threads": threads, "block_mib": block, "unit_mib": unit, "way": name, "seconds": round(seconds, 4),
                    "gb_s": round(num_bytes / seconds / 1e9, 2),
                }  # fmt: skip


def main() -> None:
    """Save a cache, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--method", default="fitted")
    parser.add_argument("--threads", type=int, nargs="+", default=[12, 8, 16])
    parser.add_argument("--blocks", type=int, nargs="+", default=[16, 8, 32])
    parser.add_argument("--units", type=int, nargs="+", default=[64])
    parser.add_argument("--times", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the cache is saved (default: the system's temporary folder)")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.speed.restore: expected a CUDA GPU, found none; run it on a machine with one")
    model, found = build("llama-8b"), list[dict[str, Any]]()
    folder = Path(tempfile.mkdtemp(prefix="restore-", dir=options.folder))
    try:
        cache = SpinCache(model, options.method)
        fill_spin(cache, model.config, options.tokens)
        cache.save_pretrained(folder)
        del cache
        for row in rows(model, folder, options):
            found.append(row)
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            if options.output is not None:
                options.output.write_text(json.dumps(found, indent=1) + "\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
