"""What it costs to index a prompt, method by method: `python -m benchmarks.speed.index_cost`.

--tokens 32768    the prompt; one sequence, Llama-3.1-8B shape, random weights, bf16
--times 3         the median of so many, after one that is not counted
--output FILE     where to write (default: benchmarks/results/index-cost.json)

dense      prefill with DynamicCache
methods    prefill with SpinCache, which stores the tokens in pages and summarises them
cluster    of methods that cluster: arranging the tokens in all layers and summarising their pages anew, which is done at the
           begin of the step after the prefill
share      what all of this takes more than the dense prefill, as a share of that
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from benchmarks.common.inspection import state_of
from benchmarks.common.record import RESULTS, fingerprint
from benchmarks.common.rows_file import Rows
from benchmarks.common.shapes import build
from benchmarks.common.timing import free
from spin_hf import SpinCache
from spin_hf.indexing import cluster

METHODS = ("retroinfer", "bisection", "quest", "shadowkv")
_SHAPE = "llama-8b"


def milliseconds(device: torch.device, work: Callable[[], object]) -> float:
    """How long it takes, by events of the GPU where there is one."""
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return (time.perf_counter() - started) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


@torch.no_grad()
def once(model: Any, ids: Tensor, cache: Cache) -> dict[str, float]:
    """Milliseconds of one prefill, and of clustering behind it."""
    row = {"prefill_ms": milliseconds(ids.device, lambda: model(ids, past_key_values=cache, logits_to_keep=1))}
    if isinstance(cache, SpinCache):
        row["cluster_ms"] = milliseconds(ids.device, lambda: cluster.cluster_new_tokens(state_of(cache)))
    return row


def measure(model: Any, ids: Tensor, new_cache: Callable[[], Cache], times: int) -> dict[str, float]:
    """Medians of `times` after one to warm up."""
    rows = []
    for _ in range(times + 1):
        free()
        rows.append(once(model, ids, new_cache()))
    return {name: round(statistics.median(row[name] for row in rows[1:]), 2) for name in rows[0]}


def share(row: dict[str, float], dense: dict[str, float]) -> dict[str, float]:
    """A row with what it takes more than `dense`, as shares of that."""
    prefill = dense["prefill_ms"]
    return {
        **row, "cluster_share": round(row["cluster_ms"] / prefill, 4),
        "share": round((row["prefill_ms"] + row["cluster_ms"]) / prefill - 1, 4),
    }  # fmt: skip


def measure_all(model: Any, ids: Tensor, times: int, put: Callable[[str, dict[str, float]], None]) -> None:
    """Rows of the dense cache and of all methods, each handed to `put` as soon as it is there."""
    dense = measure(model, ids, lambda: DynamicCache(config=model.config), times)
    put("dense", dense)
    for method in METHODS:
        put(method, share(measure(model, ids, partial(SpinCache, model, method), times), dense))


def line(name: str, row: dict[str, float]) -> str:
    """What is printed of a row."""
    if name == "dense":
        return f"{name:12} {row['prefill_ms']:10.1f} ms"
    return (
        f"{name:12} {row['prefill_ms']:10.1f} ms {row['cluster_ms']:10.1f} ms "
        f"{row['cluster_share']:10.1%} {row['share']:10.1%}"
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "index-cost.json")
    return parser.parse_args(arguments)


def about(options: argparse.Namespace) -> dict[str, Any]:
    """What all rows of the file have in common."""
    return {
        "shape": _SHAPE, "dtype": "bfloat16", "batch": 1, "tokens": options.tokens, "times": options.times,
        "gpu": torch.cuda.get_device_name(), "sources": fingerprint(),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "triton": version("triton"),
            "transformers": transformers.__version__,
        },
    }  # fmt: skip


def main() -> None:
    """Measure and write the results."""
    options = parse()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.speed.index_cost: expected a CUDA GPU, found none; run it on a machine with one")
    command = f"python -m benchmarks.speed.index_cost --tokens {options.tokens} --times {options.times}"
    rows = Rows(options.output, about(options), command, again=True)
    model = build(_SHAPE)
    ids = torch.randint(model.config.vocab_size, (1, options.tokens), device=model.device)
    print(f"{'':12} {'prefill':>13} {'cluster':>13} {'of dense':>10} {'in all':>10}", flush=True)

    def put(name: str, row: dict[str, float]) -> None:
        rows.put(name, row)
        print(line(name, row), flush=True)

    measure_all(model, ids, options.times, put)


if __name__ == "__main__":
    main()
