"""Time to the first token and peak memory of a prompt: `python -m benchmarks.speed.prefill`.

    --shape llama-8b | qwen3-0.6b    random weights, bf16, one sequence, `generate`
    --tokens 32768 131072 8192       prompts
    --ways dynamic spin ...          only these rows (see `WAYS`)
    --times 1                        the median of so many, after one short call that is not counted
    --new 1                          new tokens: 1 for the time to the first one
    --seconds 540                    starts nothing behind this time
    --output FILE                    where to write (default: benchmarks/results/h200/prefill-<shape>.json)

Peak memory is the most that tensors take beside the weights. Rows of other sources, machines or versions are left behind.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache

from benchmarks.common.record import RESULTS, fingerprint
from benchmarks.common.rows_file import Rows
from benchmarks.common.shapes import SHAPES, build
from benchmarks.common.timing import failure, free
from spin_hf import SpinCache

CHUNK = 8192
WAYS: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "spin": (lambda model: SpinCache(model), {}),
    "dynamic": (lambda model: DynamicCache(config=model.config), {}),
    "shadowkv 2GiB": (lambda model: SpinCache(model, "shadowkv", gpu_memory="2GiB"), {}),
    "dynamic, chunks of 8192": (lambda model: DynamicCache(config=model.config), {"prefill_chunk_size": CHUNK}),
    "spin, chunks of 2048": (lambda model: SpinCache(model), {"prefill_chunk_size": 2048}),
    "spin, chunks of 4096": (lambda model: SpinCache(model, prefill_chunk_size=4096), {}),
    "spin, whole": (lambda model: SpinCache(model, prefill_chunk_size=None), {}),
    "shadowkv": (lambda model: SpinCache(model, "shadowkv"), {}),
}
"""Name -> maker of the cache, and arguments of `generate`."""


def once(model: Any, num_tokens: int, way: str, new: int) -> tuple[float, float]:
    """Seconds of one call of `generate`, and GiB at its peak beside the weights."""
    make, options = WAYS[way]
    device = model.device
    ids = torch.randint(0, model.config.vocab_size, (1, num_tokens), device=device)
    free()
    held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    started = time.perf_counter()
    cache = make(model)
    with torch.no_grad():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=new,
            do_sample=False,
            **options,
        )
    if device.type != "cuda":
        return time.perf_counter() - started, 0.0
    torch.cuda.synchronize()
    return time.perf_counter() - started, (torch.cuda.max_memory_allocated() - held) / 2**30


def row(model: Any, num_tokens: int, way: str, times: int, new: int) -> dict[str, Any]:
    """One row of the results."""
    made: dict[str, Any] = {"tokens": num_tokens, "way": way, "new_tokens": new, "times": times}
    try:
        taken = [once(model, num_tokens, way, new) for _ in range(times)]
    except Exception as error:
        return made | failure(error)
    return made | {
        "seconds": round(statistics.median(seconds for seconds, _ in taken), 4),
        "peak_gib": round(max(peak for _, peak in taken), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072, 8192])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--new", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    began = time.monotonic()
    transformers.utils.logging.set_verbosity_error()
    about = {
        "shape": given.shape, "dtype": "bfloat16", "machine": torch.cuda.get_device_name(), "sources": fingerprint(),
        "versions": {name: version(name) for name in ("torch", "transformers", "triton")},
        "python": platform.python_version(),
    }  # fmt: skip
    output = given.output or RESULTS / "h200" / f"prefill-{given.shape}.json"
    rows = Rows(output, about, "python -m benchmarks.speed.prefill", again=False)
    model = build(given.shape)
    for way in given.ways:  # compiles kernels and fills the allocator
        once(model, 20000, way, max(given.new, 2))
    for tokens in given.tokens:
        for way in given.ways:
            if time.monotonic() - began > given.seconds:
                return
            made = row(model, tokens, way, given.times, given.new)
            rows.put(f"{way}, {tokens}, {given.new} new", made)
            print(made, flush=True)


if __name__ == "__main__":
    main()
