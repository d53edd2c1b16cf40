"""Time to the first token and peak memory of a prompt: `python -m benchmarks.speed.prefill`.

    --shape llama-8b | qwen3-0.6b    random weights, bf16, one sequence, `generate`
    --tokens 32768 131072 8192       prompts
    --ways dynamic spin ...          only these rows (see `WAYS`)
    --times 1                        the median of so many, after one short call that is not counted
    --new 1                          new tokens: 1 for the time to the first one; more for the cost of the first steps behind it
    --gpu-gib 22.4                   as on a smaller GPU: torch takes no more memory; rows of another name
    --seconds 540                    starts nothing behind this time
    --output FILE                    where to write (default: benchmarks/results/h200/prefill-<shape>.json)

Random weights have no sparse attention. A sparse way chooses blocks as the product does, and then reads a given share of the
blocks before each query block, drawn at random, so that its time is that of this share. Which share a real model needs is
measured by `benchmarks.quality.sparse_prefill`.

Peak memory is the most that tensors take beside the weights. A row that fails says what and where: the innermost function of
the package. Rows of other sources, machines or versions are left behind.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from benchmarks.common.record import RESULTS, fingerprint
from benchmarks.common.rows_file import Rows, command_line
from benchmarks.common.shapes import SHAPES, build
from benchmarks.common.timing import failure, free, wait_for_device, where, with_memory
from spin_hf import SpinCache, kernels
from spin_hf.kernels import BlockLists

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
    "dynamic, chunks of 2048": (lambda model: DynamicCache(config=model.config), {"prefill_chunk_size": 2048}),
    "dynamic offloaded, chunks of 4096": (
        lambda model: DynamicCache(config=model.config, offloading=True),
        {"prefill_chunk_size": 4096},
    ),
}
"""Name -> maker of the cache, and arguments of `generate`."""
SHARES = {f"spin, sparse, {percent} % of blocks": percent / 100 for percent in (8, 15, 30)}
"""Name -> share of the blocks that a sparse way reads."""
WAYS |= {name: (lambda model: SpinCache(model, prefill="sparse"), {}) for name in SHARES}


@contextmanager
def share_of_blocks(share: float | None) -> Iterator[None]:
    """Let sparse prompts read this share of the blocks. None changes nothing."""
    original, drawn = kernels.choose_blocks, dict[tuple[int, ...], BlockLists]()

    def choose(*arguments: Any) -> BlockLists:
        chosen = original(*arguments)
        key = chosen.first, *chosen.blocks.shape
        if key not in drawn:  # once for all layers
            drawn[key] = random_lists(chosen, share or 0.0, arguments[-1])
        return drawn[key]

    if share is not None:
        kernels.choose_blocks = choose
    try:
        yield
    finally:
        kernels.choose_blocks = original


def random_lists(like: BlockLists, share: float, dense_from: int) -> BlockLists:
    """Lists of the same shape: the first block, a query block's own, and others up to a share of those before it."""
    columns = like.blocks.shape[3]
    own = like.first + torch.arange(like.counts.shape[2], device=like.blocks.device).unsqueeze(1)
    block = torch.arange(columns, device=like.blocks.device)
    weight = torch.rand(like.blocks.shape, device=like.blocks.device)
    weight = weight.masked_fill((block == 0) | (block == own), 2.0).masked_fill(block > own, -1.0)
    number = torch.where(own >= dense_from, own + 1, (share * (own + 1)).ceil().clamp(min=2).minimum(own + 1))
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask.scatter_(-1, weight.argsort(-1, descending=True), (block < number).expand_as(weight))
    place = torch.where(mask, mask.cumsum(-1) - 1, columns)  # one sort, as the time of drawing counts
    lists = torch.zeros((*mask.shape[:-1], columns + 1), dtype=torch.int32, device=mask.device)
    lists.scatter_(-1, place, block.int().expand_as(place))
    return BlockLists(lists[..., :columns].contiguous(), mask.sum(-1, dtype=torch.int32), like.first)


def about(shape: str) -> dict[str, Any]:
    """What all rows of a results file have in common."""
    return {
        "shape": shape, "dtype": "bfloat16", "gpu": torch.cuda.get_device_name(), "sources": fingerprint(),
        "versions": {name: version(name) for name in ("torch", "transformers", "triton")},
        "python": platform.python_version(),
    }  # fmt: skip


def once(model: Any, ids: Tensor, way: str, new: int) -> float:
    """Seconds of one call of `generate` with a new cache."""
    make, options = WAYS[way]
    wait_for_device()
    started = time.perf_counter()
    cache = make(model)
    with torch.no_grad(), share_of_blocks(SHARES.get(way)):
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=new,
            do_sample=False,
            **options,
        )
    wait_for_device()
    return time.perf_counter() - started


def prompt(model: Any, num_tokens: int) -> Tensor:
    """Random ids [1, num_tokens]."""
    return torch.randint(0, model.config.vocab_size, (1, num_tokens), device=model.device)


def row(model: Any, num_tokens: int, way: str, times: int, new: int) -> dict[str, Any]:
    """One row of the results."""
    made: dict[str, Any] = {"tokens": num_tokens, "way": way, "new_tokens": new, "times": times}
    taken = []
    try:
        for _ in range(times):
            ids = prompt(model, num_tokens)
            free()
            held = torch.cuda.memory_allocated()
            taken.append(with_memory(lambda ids=ids: {"seconds": once(model, ids, way, new)}, held))
    except Exception as error:
        return made | failure(error) | where(error)
    return made | {
        "seconds": round(statistics.median(each["seconds"] for each in taken), 4),
        "peak_gib": max(each["peak_gpu_gib"] for each in taken),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072, 8192])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--new", type=int, default=1)
    parser.add_argument("--gpu-gib", type=float)
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    began = time.monotonic()
    transformers.utils.logging.set_verbosity_error()
    output = given.output or RESULTS / "h200" / f"prefill-{given.shape}.json"
    command = command_line("speed.prefill", None).replace(f" --output {given.output}", "")
    rows = Rows(output, about(given.shape), command)
    limit = "" if given.gpu_gib is None else f", {given.gpu_gib:g} GiB"
    if given.gpu_gib is not None:
        torch.cuda.set_per_process_memory_fraction(given.gpu_gib * 2**30 / torch.cuda.mem_get_info()[1])
    model = build(given.shape)
    for way in given.ways:  # compiles kernels and fills the allocator
        free()
        once(model, prompt(model, 20000), way, max(given.new, 2))
    for tokens in given.tokens:
        for way in given.ways:
            if time.monotonic() - began > given.seconds:
                return
            made = row(model, tokens, way, given.times, given.new)
            rows.put(f"{way}, {tokens}, {given.new} new{limit}", made | {"gpu_gib": given.gpu_gib})
            print(made, flush=True)


if __name__ == "__main__":
    main()
