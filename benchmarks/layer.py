"""One layer's decode attention on a CUDA GPU, kernel by kernel: `python benchmarks/layer.py`.

Shape of Llama-3.1-8B (32 query heads, 8 KV heads, head size 128), bf16, one sequence, random keys, values and queries,
budget 2,048 tokens. `graph_us` replays a captured step whose query stays the same (all selected pages resident after the
first), `all_new_us` replays it with a fresh random query each time, which is the least overlap that a step can have.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from spin_hf import SpinCache
from spin_hf.attend import Call
from spin_hf.storage.host import HostSlab
from spin_hf.storage.registration import CudaRegistrar

CASES = [(8192, "auto"), (32768, "auto"), (131072, "auto"), (131072, "256MiB"), (524288, "1GiB")]
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def measure(num_tokens: int, gpu_memory: str, budget: int, repeats: int) -> dict[str, Any]:
    """Times of one layer that holds `num_tokens`, in microseconds."""
    device, dtype = torch.device("cuda", torch.cuda.current_device()), torch.bfloat16
    config = LlamaConfig(
        hidden_size=HEADS * HEAD_DIM, num_hidden_layers=1, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
        max_position_embeddings=1 << 20,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    cache = SpinCache(config, budget=budget, gpu_memory=gpu_memory)
    layer, shared = cache.layers[0], cache._shared
    torch.cuda.synchronize()
    started = time.perf_counter()
    for start in range(0, num_tokens, 32768):
        count = min(32768, num_tokens - start)
        key = torch.randn(1, KV_HEADS, count, HEAD_DIM, device=device, dtype=dtype)
        layer.append(key, torch.randn_like(key), None)
        shared.commit()
    torch.cuda.synchronize()
    filled = time.perf_counter() - started
    token = torch.randn(1, KV_HEADS, 1, HEAD_DIM, device=device, dtype=dtype)
    layer.append(token, token, None)
    shared.commit()
    step = shared.step_kernels(layer._store().device, KV_HEADS)
    query = torch.randn(1, HEADS, 1, HEAD_DIM, device=device, dtype=dtype)
    call = Call(query.unflatten(1, (KV_HEADS, -1)), HEAD_DIM**-0.5, None, None)
    out = torch.empty(1, 1, HEADS, HEAD_DIM, device=device, dtype=dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step.attend(layer, call, out)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.attend(layer, call, out)

    def replay() -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) * 1e3

    replay()
    same = [replay() for _ in range(repeats)]
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(10):
            graph.replay()
        torch.cuda.synchronize()
    kernels = {
        event.key: round(event.self_device_time_total / event.count, 1)
        for event in profiled.key_averages()
        if event.self_device_time_total
    }
    new = []
    loads_before = cache.stats().loads
    for _ in range(repeats):
        query.normal_()
        new.append(replay())
    return {
        "tokens": num_tokens,
        "gpu_memory": gpu_memory,
        "fill_s": round(filled, 3),
        "graph_us": round(statistics.median(same), 1),
        "all_new_us": round(statistics.median(new), 1),
        "all_new_loads_mib": round((cache.stats().loads - loads_before) / repeats * 8 * 2 * HEAD_DIM * 2 / 2**20, 3),
        "kernels_us": kernels,
    }


def page_locking() -> dict[str, float]:
    """Seconds to get page-locked host memory, ours and torch's."""
    device, result = torch.device("cuda", torch.cuda.current_device()), {}
    for gib in (1, 16):
        started = time.perf_counter()
        slab = HostSlab(gib << 30, CudaRegistrar(device))
        result[f"slab_{gib}_gib_s"] = round(time.perf_counter() - started, 3)
        del slab
    started = time.perf_counter()
    pinned = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    result["pin_memory_1_gib_s"] = round(time.perf_counter() - started, 3)
    del pinned
    return result


def main() -> None:
    """Measure all cases and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--budget", type=int, default=2048, help="tokens")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "layer.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/layer.py: expected a CUDA GPU, found none; run it on a machine with one")
    torch.zeros(1, device="cuda")
    locking = page_locking()
    print(locking, flush=True)
    rows = []
    for num_tokens, gpu_memory in CASES:
        rows.append(measure(num_tokens, gpu_memory, options.budget, options.repeats))
        print(rows[-1], flush=True)
        torch.cuda.empty_cache()
    result = {
        "command": "python benchmarks/layer.py",
        "gpu": torch.cuda.get_device_name(),
        "shape": {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "dtype": "bfloat16", "batch": 1},
        "budget_tokens": options.budget,
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "triton": version("triton"),
            "transformers": transformers.__version__,
        },
        "page_locking": locking,
        "rows": rows,
    }  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
