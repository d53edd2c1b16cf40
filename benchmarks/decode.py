"""Time per output token (TPOT) against every cache that a user could take instead: `python benchmarks/decode.py`.

    --shape llama-8b | qwen3-0.6b    random weights, synthetic keys and values, bf16, one sequence
    --tokens 4096 32768 ...          contexts

    spin          SpinCache(model), captured steps, under `generate`
    spin compiled SpinCache(model.config), compiled by `generate`; `first_call_s` is mostly the compilation
    spin eager    the same with `disable_compile`
    dynamic       DynamicCache                       offloaded   DynamicCache(offloading=True)
    static        StaticCache, compiled by `generate`
    dense graph   flash decoding over all tokens in a CUDA graph captured by hand: what a serving engine does
    floor         the same graph, attention left out

TPOT is (time of `generate` with 72 new tokens - with 8) / 64, the median of three (fewer tokens for the slow ones); for
the two graphs, of replays. How much of a step's selection the step before had selected too depends on the weights; it is
measured with token embeddings that are all alike and with independent ones, as `measured_overlap`.
Writes `benchmarks/results/decode-<shape>.json`.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from dense_graph import DenseLayer, in_graph
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    Qwen3Config,
    StaticCache,
)
from transformers.cache_utils import Cache
from transformers.initialization import no_init_weights

from spin_hf import SpinCache
from spin_hf.kernels.fields import StepField

_COMMON: dict[str, Any] = {"max_position_embeddings": 1 << 20, "dtype": torch.bfloat16}
SHAPES: dict[str, Any] = {
    "llama-8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, **_COMMON,
    ),
    "qwen3-0.6b": Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}, **_COMMON,
    ),
}  # fmt: skip
CHUNK = 32768
FEW, MANY, TIMES = 8, 72, 3
CAPS = {131072: "4GiB", 524288: "8GiB"}
"""Contexts at which the cache is measured with a cap on its GPU memory too; at 512K the summaries alone take 4.1 GiB."""
ONLY_AT = {
    "offloaded": (32768, 131072), "static": (4096, 32768, 131072), "spin compiled": (8192, 131072),
    "spin eager": (8192, 131072),
}  # fmt: skip
"""Contexts of the rows that take long."""
SPREADS = {"same token": 0.0, "random tokens": 1.0}


def build(shape: str) -> Any:
    """The model with random weights on the GPU."""
    config = SHAPES[shape]
    config._attn_implementation = "sdpa"
    with torch.device("cuda"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02) if parameter.dim() > 1 else parameter.data.fill_(1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def spread_embeddings(model: Any, spread: float) -> None:
    """Tokens that differ by `spread` of their length: 0 gives every step the same query but for its position."""
    generator = torch.Generator("cuda").manual_seed(0)
    table = model.get_input_embeddings().weight.data
    base = torch.randn(table.shape[1], device="cuda", generator=generator)
    for rows in table.split(8192):
        noise = torch.randn(rows.shape, device="cuda", generator=generator)
        rows.copy_(0.02 * ((1 - spread**2) ** 0.5 * base + spread * noise))


def states(config: Any, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of `count` tokens of one layer."""
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key = torch.randn(1, config.num_key_value_heads, count, dim, device="cuda", dtype=torch.bfloat16)
    return key, torch.randn_like(key)


def fill_spin(cache: SpinCache, config: Any, num_tokens: int) -> None:
    """Give a SpinCache `num_tokens` tokens."""
    for start in range(0, num_tokens, CHUNK):
        for layer in cache.layers:
            layer.append(*states(config, min(CHUNK, num_tokens - start)), None)
        cache._shared.commit()
    cache._shared.visible_length.fill_(num_tokens)


def fill(cache: Cache, config: Any, num_tokens: int) -> None:
    """Give one of transformers' caches `num_tokens` tokens."""
    for index in range(config.num_hidden_layers):
        cache.update(*states(config, num_tokens), index)


def tpot(
    model: Any, cache: Cache, num_tokens: int, many: int = MANY, times: int = TIMES, **options: Any
) -> dict[str, float]:
    """Milliseconds per token under `generate`, which goes on from where the cache stands."""
    held, first = num_tokens, None

    def run(count: int) -> float:
        nonlocal held, first
        ids = torch.randint(0, 1000, (1, held + 1), device="cuda")
        torch.cuda.synchronize()
        started = time.perf_counter()
        model.generate(
            ids, past_key_values=cache, max_new_tokens=count, do_sample=False,
            attention_mask=torch.ones_like(ids), **options,
        )  # fmt: skip
        torch.cuda.synchronize()
        took = time.perf_counter() - started
        held += count
        if first is None:
            first = took
        return took

    run(FEW)
    took = [(run(many) - run(FEW)) / (many - FEW) * 1e3 for _ in range(times)]
    return {"tpot_ms": round(statistics.median(took), 3), "spread_ms": round(max(took) - min(took), 3),
            "first_call_s": round(first or 0, 3)}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ spin


def overlap(model: Any, cache: SpinCache, steps: int = 6) -> float:
    """Share of a step's pages that the step before had selected too, over layers and KV heads; runs eager steps."""
    shared, seen, shares = cache._shared, {}, []
    kernels = shared.kernels_in_use()[0]
    attend, flow = kernels.attend, torch.Generator().manual_seed(0)

    def recording(layer: Any, call: Any, out: torch.Tensor) -> None:
        attend(layer, call, out)
        pages, counts = kernels.scratch[StepField.LIST_PAGE].cpu(), kernels.list_count[:, 0].tolist()
        for head, count in enumerate(counts):
            now = set(pages[head, :count].tolist())
            before = seen.get((layer.number, head))
            if before is not None:
                shares.append(len(now & before) / len(now))
            seen[layer.number, head] = now

    kernels.attend = recording
    for _ in range(steps):
        token = torch.randint(0, 1000, (1, 1), generator=flow).cuda()
        with torch.no_grad():
            model.model(input_ids=token, past_key_values=cache)
    del kernels.attend
    return sum(shares) / len(shares)


def spin(model: Any, num_tokens: int, budget: int, **options: Any) -> list[dict[str, Any]]:
    """Rows of one context, one for each kind of embeddings."""
    torch.cuda.synchronize()
    cache = SpinCache(model, budget=budget, **options)
    started = time.perf_counter()
    fill_spin(cache, model.config, num_tokens)
    torch.cuda.synchronize()
    filled, rows, held = time.perf_counter() - started, [], num_tokens
    row_bytes = cache.layers[0].store.home.row_bytes
    for name, spread in SPREADS.items():
        spread_embeddings(model, spread)
        before = cache.stats()
        times = tpot(model, cache, held)
        held, after = cache.get_seq_length(), cache.stats()
        loads, hits = after.loads - before.loads, _hits(after) - _hits(before)
        rows.append({
            "cache": "spin", "embeddings": name, "gpu_memory": options.get("gpu_memory", "auto"), **times,
            "fill_s": round(filled, 2),
            "loads_mib_per_token": round(loads * row_bytes / (TIMES * (FEW + MANY) + FEW) / 2**20, 3),
            "hit_rate": round(hits / (hits + loads), 4) if hits + loads else 1.0,
            "attended_tokens": round(after.attended_tokens, 1),
            "gpu_gib": round(after.gpu_bytes / 2**30, 2), "cpu_gib": round(after.cpu_bytes / 2**30, 2),
            "captured": sum(step is not None for step in cache.steps.captured.values()),
            "measured_overlap": round(overlap(model, cache), 4),
        })  # fmt: skip
        held = cache.get_seq_length()
    return rows


def _hits(stats: Any) -> float:
    return stats.loads * stats.hit_rate / (1 - stats.hit_rate) if stats.loads else 0.0


def attempt(label: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row, or why there is none; frees what the measurement left."""
    try:
        row = {"cache": label, **measure()}
    except torch.cuda.OutOfMemoryError:
        row = {"cache": label, "tpot_ms": None, "why": "out of GPU memory"}
    gc.collect()
    torch.cuda.empty_cache()
    return row


def rivals(model: Any, num_tokens: int, names: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of one context, one for each other cache."""
    config = model.config

    def filled(cache: Cache) -> Cache:
        fill(cache, config, num_tokens)
        return cache

    def static() -> dict[str, Any]:
        torch._dynamo.reset()
        return tpot(model, filled(StaticCache(config=config, max_cache_len=num_tokens + 300)), num_tokens)

    def graph(attends: bool) -> dict[str, Any]:
        layers = [DenseLayer(*states(config, num_tokens if attends else 16)) for _ in range(config.num_hidden_layers)]
        return in_graph(model, Cache(layers=layers), num_tokens, attends)

    def from_config(**options: Any) -> dict[str, Any]:
        cache = SpinCache(config)
        fill_spin(cache, config, num_tokens)
        return tpot(model, cache, num_tokens, **options)

    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "spin compiled": from_config,
        "spin eager": lambda: from_config(many=24, disable_compile=True),
        "dynamic": lambda: tpot(model, filled(DynamicCache(config=config)), num_tokens, many=24),
        "offloaded": lambda: tpot(model, filled(DynamicCache(config=config, offloading=True)), num_tokens, 12, 1),
        "static": static,
        "dense graph": lambda: graph(True),
        "floor": lambda: graph(False),
    }
    return (attempt(name, ways[name]) for name in names)


def measured(model: Any, num_tokens: int, budget: int, names: list[str]) -> Iterator[dict[str, Any]]:
    """All rows of one context, each as soon as it is there."""
    yield from spin(model, num_tokens, budget)
    if num_tokens in CAPS:
        yield from spin(model, num_tokens, budget, gpu_memory=CAPS[num_tokens])
    yield from rivals(model, num_tokens, names)


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[131072, 8192, 524288, 32768, 4096])
    parser.add_argument("--budget", type=int, default=2048, help="tokens")
    parser.add_argument(
        "--rivals",
        nargs="*",
        default=["spin compiled", "spin eager", "floor", "dense graph", "dynamic", "offloaded", "static"],
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/decode.py: expected a CUDA GPU, found none; run it on a machine with one")
    logging.getLogger("spin_hf").setLevel(logging.INFO)
    results = Path(__file__).parent / "results"
    model = build(options.shape)
    weights = torch.cuda.memory_allocated()
    output = options.output or results / f"decode-{options.shape}.json"
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/decode.py", *sys.argv[1:]]),
        "gpu": torch.cuda.get_device_name(), "shape": options.shape, "dtype": "bfloat16", "batch": 1,
        "weights_gib": round(weights / 2**30, 2), "budget_tokens": options.budget,
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "triton": version("triton"),
            "transformers": transformers.__version__,
        },
        "rows": [],
    }  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    for num_tokens in options.tokens:
        gc.collect()
        torch.cuda.empty_cache()
        names = [name for name in options.rivals if num_tokens in ONLY_AT.get(name, (num_tokens,))]
        for row in measured(model, num_tokens, options.budget, names):
            result["rows"].append({"tokens": num_tokens, **row})
            print(json.dumps(result["rows"][-1]), flush=True)
            result["rows"].sort(key=lambda row: row["tokens"])
            output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
