"""One layer's decode attention on a CUDA GPU, and the host link under it: `python -m benchmarks.speed.layer`, two minutes.

Shape of Llama-3.1-8B (32 query heads, 8 KV heads, head size 128), bf16, one sequence, random keys, values and queries. A
captured step of one layer, its token stored, on the GPU's clock:

    same     the same query again: all that it selects is resident
    new      an unrelated query each time, the least overlap that steps can have, once the buffer is warm; what it takes
             longer than `same` is what the loads take: `load_gb_s`, with the search for page frames; `attend_load_gb_s`
             by what the attention kernel alone takes longer, which does the loading
    kernels  microseconds of each kernel by torch.profiler, in a second pass, as it slows down later launches of graphs

Besides: bursts of random pages by a plain kernel (`link.py`), and the seconds to get page-locked host memory.
Writes `benchmarks/results/layer.json`.
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

from benchmarks.common.inspection import counted_by_kernels, forward_of
from benchmarks.common.link import bursts, copies, gpu_us
from benchmarks.common.record import RESULTS, fingerprint
from benchmarks.common.shapes import SHAPES, fill_spin, states
from benchmarks.common.timing import free
from benchmarks.speed.step_profile import kernel_names, per_layer
from spin_hf import SpinCache
from spin_hf.kernels.descriptor_fields import StepField
from spin_hf.storage.host_register import CudaRegistrar
from spin_hf.storage.pinned_slab import HostSlab

CASES = [
    (8192, "auto", 2048), (32768, "auto", 2048), (131072, "auto", 2048), (131072, "256MiB", 2048), (131072, "256MiB", 8192),
    (131072, "256MiB", 32768), (524288, "1GiB", 2048),
]  # fmt: skip
"""Tokens, cap of one layer, and budget: larger budgets load larger bursts."""
WARM, PROFILED = 60, 10
NAMES = ("same", "new")


class Case:
    """One layer that holds `num_tokens`, and its captured step."""

    def __init__(self, num_tokens: int, gpu_memory: str, budget: int) -> None:
        config = type(SHAPES["llama-8b"])(**{**SHAPES["llama-8b"].to_dict(), "num_hidden_layers": 1})
        config.dtype, config._attn_implementation = torch.bfloat16, "sdpa"
        self.about = {"tokens": num_tokens, "gpu_memory": gpu_memory, "budget_tokens": budget}
        self.cache = SpinCache(config, "shadowkv", budget=budget, gpu_memory=gpu_memory, dense_below=0)
        torch.cuda.synchronize()
        started = time.perf_counter()
        fill_spin(self.cache, config, num_tokens)
        torch.cuda.synchronize()
        self.about["fill_s"] = round(time.perf_counter() - started, 3)
        layer: Any = self.cache.layers[0]
        key, value = states(config, 1)
        forward_of(self.cache).prepare(1, 1, None)
        shape = (1, config.num_attention_heads, 1, config.head_dim)
        self.query = torch.randn(shape, device=key.device, dtype=key.dtype)
        out = torch.empty((1, 1, *shape[1::2]), device=key.device, dtype=key.dtype)

        self.other_memory = torch.empty(256 << 20, dtype=torch.uint8, device=key.device)

        def step() -> None:
            layer.run(self.query, key, value, None, None, out, True, config.head_dim**-0.5, None)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            step()

    def tick(self) -> None:
        """The clock of the residency goes on, and nothing is in the GPU's caches, as between steps of a model."""
        self.other_memory.zero_()
        forward_of(self.cache).backends.in_use()[0].step[StepField.CLOCK] += 1

    def other_query(self) -> None:
        """The next step asks something unrelated."""
        self.query.normal_()
        self.tick()

    def measure(self, repeats: int) -> dict[str, Any]:
        """Microseconds with the same and with other queries, and the rate of the loads."""
        store = self.cache.paged_layers[0].store
        assert store is not None
        if store.frames is not None:
            for _ in range(WARM):
                self.other_query()
                self.graph.replay()
        gpu_us(self.graph.replay, before=self.tick, repeats=3)
        same = statistics.median(gpu_us(self.graph.replay, before=self.tick, repeats=repeats))
        took, loaded = [], []
        for _ in range(repeats):
            before = counted_by_kernels(self.cache)["LOADS"]
            took += gpu_us(self.graph.replay, before=self.other_query, repeats=1)
            loaded.append((counted_by_kernels(self.cache)["LOADS"] - before) * store.backing.row_bytes)
        row = {
            **self.about, "same_us": round(same, 1), "new_us": round(statistics.median(took), 1),
            "new_loads_mib": round(statistics.mean(loaded) / 2**20, 3),
        }  # fmt: skip
        if sum(loaded):
            rates = [size / max(us - same, 1e-3) / 1e3 for us, size in zip(took, loaded, strict=True)]
            row["load_gb_s"] = round(statistics.median(rates), 1)
        return row

    def kernels(self) -> dict[str, Any]:
        """Microseconds of each kernel of the package with the same query and with other ones, and the rate of the loads."""
        result: dict[str, Any] = {}
        loaded = 0
        for name, before in zip(NAMES, (self.tick, self.other_query), strict=True):
            loaded = counted_by_kernels(self.cache)["LOADS"]
            with profile(activities=[ProfilerActivity.CUDA]) as profiled:
                for _ in range(PROFILED):
                    before()
                    self.graph.replay()
                torch.cuda.synchronize()
            events = [(event.key, event.count, event.self_device_time_total) for event in profiled.key_averages()]
            took, _, _ = per_layer(events, kernel_names(), PROFILED, 1)
            result[f"{name}_kernels_us"] = {kernel: round(us, 2) for kernel, us in sorted(took.items())}
            loaded = counted_by_kernels(self.cache)["LOADS"] - loaded
        if loaded:  # of the queries profiled last, the new ones
            attend = {
                name: sum(us for kernel, us in result[f"{name}_kernels_us"].items() if "attend" in kernel)
                for name in NAMES
            }
            burst = loaded * self.cache.paged_layers[0].store.backing.row_bytes / PROFILED
            result["attend_load_gb_s"] = round(burst / (attend["new"] - attend["same"]) / 1e3, 1)
        return result


def page_locking() -> dict[str, float]:
    """Seconds to get page-locked host memory: the package's (touched and registered), and torch's."""
    device, result = torch.device("cuda", torch.cuda.current_device()), {}
    for name, gib in (("slab_1_gib_s", 1), ("slab_16_gib_s", 16), ("slab_16_gib_again_s", 16)):
        started = time.perf_counter()
        slab = HostSlab(gib << 30, CudaRegistrar(device))
        result[name] = round(time.perf_counter() - started, 3)
        del slab
    started = time.perf_counter()
    pinned = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    result["pin_memory_1_gib_s"] = round(time.perf_counter() - started, 3)
    del pinned
    return result


def main() -> None:
    """Measure all cases and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--output", type=Path, default=RESULTS / "layer.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.speed.layer: expected a CUDA GPU, found none; run it on a machine with one")
    torch.zeros(1, device="cuda")
    result: dict[str, Any] = {
        "command": "python -m benchmarks.speed.layer", "gpu": torch.cuda.get_device_name(), "sources": fingerprint(),
        "shape": {"heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16", "batch": 1},
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "triton": version("triton"),
            "transformers": transformers.__version__,
        },
        "page_locking": page_locking(), **copies(), "burst_gb_s": bursts(), "rows": [],
    }  # fmt: skip
    print({key: result[key] for key in ("page_locking", "copy_gb_s", "link_gb_s", "burst_gb_s")}, flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        options.output.write_text(json.dumps(result, indent=1) + "\n")

    cases = []
    for tokens, gpu_memory, budget in CASES:
        case = Case(tokens, gpu_memory, budget)
        result["rows"].append(case.measure(options.repeats))
        print(result["rows"][-1], flush=True)
        cases.append(case)
        write()
    for row, case in zip(result["rows"], cases, strict=True):
        row |= case.kernels()
        print({key: row[key] for key in row if key not in ("fill_s", "same_us", "new_us")}, flush=True)
        write()
    free()


if __name__ == "__main__":
    main()
