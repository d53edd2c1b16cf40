"""Longest prompts that fit smaller GPUs, as `spin_hf.plan` says: `python -m benchmarks.memory.cards`. Needs no GPU.

    --methods fitted shadowkv    of SpinCache
    --output FILE                default: benchmarks/results/cards.json

card     GPU memory that a process gets, and free host memory
model    weights in 16 bits, or with linear layers in 4.5 bits for each weight (four bits and scales)
fits     keys, values and summaries, tables, and the temporary memory of the prompt, which is read in chunks; one sequence
         `on the GPU`: all pages stay there. `with host memory`: pages live in host memory

Contexts are multiples of 1,024 tokens, up to a million, whatever the model was trained for.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.common.record import RESULTS, fingerprint
from benchmarks.common.rows_file import Rows, command_line
from benchmarks.common.shapes import SHAPES
from spin_hf import MemoryPlan, plan

GIB = 1 << 30
CARDS = {"T4, 16 GB": (14.6, 11.0), "RTX 3090 or 4090, 24 GB": (23.2, 56.0)}
"""Name -> GiB of GPU memory for weights and cache, GiB of free host memory (Colab's machine; one with 64 GB)."""
BITS = {"16-bit weights": 16.0, "4-bit weights": 4.5}
MODELS = (("llama-8b", "16-bit weights"), ("llama-8b", "4-bit weights"), ("qwen3-0.6b", "16-bit weights"))
DTYPE = torch.float16
"""Of keys and values, and of weights in 16 bits: a T4 has no bfloat16."""
STEP, MOST = 1024, 1 << 20


def weight_bytes(shape: str, bits: float) -> int:
    """Bytes of a model whose linear layers, except for the head, have so many bits for each weight."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[shape])
    head = model.get_output_embeddings()
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear) and module is not head}
    sizes = [(parameter.numel(), bits if id(parameter) in linear else 16.0) for parameter in model.parameters()]
    return int(sum(number * each for number, each in sizes) / 8)


def planned(shape: str, method: str, tokens: int, free: int) -> MemoryPlan:
    """The plan of one sequence on a GPU with so many free bytes."""
    with patch("spin_hf.memory.plan.free_gpu_memory", lambda device: free):
        return plan(SHAPES[shape], context_length=tokens, dtype=DTYPE, method=method)


def fits(made: MemoryPlan, free: int, host: int, on_gpu: bool) -> bool:
    """Whether a plan fits, with all pages on the GPU or also without."""
    taken = made.gpu_bytes + made.metadata_bytes + made.prefill_bytes
    return made.fits and taken <= free and made.cpu_bytes <= host and not (on_gpu and made.page_frames)


def longest(shape: str, method: str, free: int, host: int, on_gpu: bool) -> int:
    """Most tokens that fit; 0 if not even the shortest context does."""
    low, high = 0, MOST // STEP
    while low < high:
        middle = (low + high + 1) // 2
        if fits(planned(shape, method, middle * STEP, free), free, host, on_gpu):
            low = middle
        else:
            high = middle - 1
    return low * STEP


def row(card: str, shape: str, weights: str, method: str) -> dict[str, Any]:
    """One row of the results."""
    memory, host = CARDS[card]
    taken = weight_bytes(shape, BITS[weights])
    free = int(memory * GIB) - taken
    made: dict[str, Any] = {
        "card": card, "gpu_gib": memory, "host_gib": host, "model": shape, "weights": weights,
        "weights_gib": round(taken / GIB, 2), "method": method,
    }  # fmt: skip
    if free <= 0:
        return made | {"why": "the weights do not fit"}
    bytes_of_host = int(host * GIB)
    on_gpu, in_host = (longest(shape, method, free, bytes_of_host, only) for only in (True, False))
    most = planned(shape, method, max(on_gpu, in_host, STEP), free)
    return made | {
        "tokens_on_gpu": on_gpu, "tokens_with_host": max(on_gpu, in_host),
        "prompt_gib": round(most.prefill_bytes / GIB, 2), "host_pages_gib": round(most.cpu_bytes / GIB, 2),
    }  # fmt: skip


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """The table, in Markdown."""
    head = (
        "GPU",
        "model",
        "weights, GiB",
        "method",
        "tokens on the GPU",
        "with host memory",
        "memory of the prompt, GiB",
    )
    made = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for each in rows:
        model = f"{each['model']}, {each['weights']}"
        cells = [each["card"], model, f"{each['weights_gib']:.1f}", each["method"]]
        if "why" in each:
            cells += [each["why"], "", ""]
        else:
            cells += [
                f"{each['tokens_on_gpu']:,}",
                f"{each['tokens_with_host']:,}",
                f"{each['prompt_gib']:.1f}",
            ]
        made.append(f"| {' | '.join(cells)} |")
    return made


def main() -> None:
    """Plan all rows, write and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["fitted", "shadowkv"])
    parser.add_argument("--output", type=Path, default=RESULTS / "cards.json")
    options = parser.parse_args()
    about = {
        "dtype": "float16", "sources": fingerprint(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }  # fmt: skip
    rows = Rows(options.output, about, command_line("memory.cards", None), again=True)
    for card in CARDS:
        for shape, weights in MODELS:
            for method in options.methods:
                rows.put(f"{card}, {shape}, {weights}, {method}", row(card, shape, weights, method))
    print("\n".join(lines(list(rows.rows.values()))))


if __name__ == "__main__":
    main()
