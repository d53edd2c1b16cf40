"""Prompts that are read once and used again: `python -m benchmarks.speed.prefixes`.

    --shape llama-8b | qwen3-0.6b    random weights and tokens, bf16, one sequence, `generate`
    --tokens 131072                  the document
    --only prefill fork ...          only these parts (see `PARTS`)
    --seconds 540                    starts no part, and no cold read of the disk, behind this time
    --output FILE                    where to write (default: benchmarks/results/h200/prefixes-<shape>.json)
    --folder FOLDER                  where stores on disk lie (default: a temporary folder, removed at the end)

    prefill      time to the first token and memory, `DynamicCache` and `SpinCache`
    fork         `cache.fork()` beside `copy.deepcopy` of a `DynamicCache`, keys and values drawn
    questions    eight questions on one document: forks, deep copies, and a prefill for each
    memory store, disk store     time to the first token behind a restored prompt
    lookup       a prompt among 1,000 stored prefixes
    agent loop   a history that grows over 20 turns: kept by hand, read anew each turn, and in a store

Everything is measured once, unless a row says otherwise. Memory is what tensors take beside the weights.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import tempfile
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
from transformers.generation.streamers import BaseStreamer

from benchmarks.common.record import RESULTS, fingerprint
from benchmarks.common.rows_file import Rows as RowsFile
from benchmarks.common.rows_file import command_line
from benchmarks.common.shapes import SHAPES, build, fill_spin, states
from benchmarks.common.timing import failure, free, wait_for_device, with_memory
from benchmarks.speed.prefill import prompt
from benchmarks.speed.prefill import row as prefill_row
from benchmarks.speed.stored_prefixes import (
    BLOCK,
    MEMORY_CAP,
    Rows,
    Run,
    disk_store,
    generated,
    gib,
    longer,
    lookup,
    memory_store,
    timed,
)
from spin_hf import PromptStore, SpinCache, enable

QUESTIONS, ANSWER, FORKS = 8, 16, 5
TURNS, REPLY = 20, 8
WARM_TOKENS = 20000


def dynamic(model: Any) -> DynamicCache:
    """A `DynamicCache` of the model."""
    return DynamicCache(config=model.config)


def prefill(run: Run) -> Rows:
    """Time to the first token and memory."""
    for way in ("dynamic", "spin"):
        free()
        yield f"prefill, {way}", prefill_row(run.model, run.tokens, way, 1, 1)


def fork(run: Run) -> Rows:
    """Seconds and GPU memory of a fork of a `SpinCache`, and of a deep copy of a `DynamicCache`."""
    config, device = run.model.config, str(run.model.device)
    free()
    cache: Any = SpinCache(run.model)
    fill_spin(cache, config, run.tokens, device)
    forks = [copied(cache.fork) for _ in range(FORKS + 1)]
    first, later = forks[0], forks[1:]
    yield "fork, first", {"tokens": run.tokens, **first}
    yield "fork, later", {
        "tokens": run.tokens, "seconds": statistics.median(each["seconds"] for each in later), "times": FORKS,
        "gpu_bytes": max(each["gpu_bytes"] for each in later),
    }  # fmt: skip
    del cache
    free()
    cache = dynamic(run.model)
    for index in range(config.num_hidden_layers):
        cache.update(*states(config, run.tokens, device), index)
    yield "fork, deepcopy of DynamicCache", {"tokens": run.tokens, **copied(lambda: copy.deepcopy(cache))}


def copied(call: Callable[[], Any]) -> dict[str, Any]:
    """Seconds of a copy, and the GPU memory that it takes while it lives."""
    before = torch.cuda.memory_allocated()
    seconds, made = timed(call)
    taken = torch.cuda.memory_allocated() - before
    del made
    return {"seconds": round(seconds, 6), "gpu_bytes": taken}


def questions(run: Run) -> Rows:
    """Eight questions on one document."""
    model, document = run.model, prompt(run.model, run.tokens)
    asked = [longer(model, document) for _ in range(QUESTIONS)]
    about = {"tokens": run.tokens, "questions": QUESTIONS, "new_tokens": ANSWER}
    free()
    weights = torch.cuda.memory_allocated()
    ways: list[tuple[str, Callable[[], Any], Callable[[Any], Any]]] = [
        ("forks", lambda: SpinCache(model), lambda cache: cache.fork()),
        ("deepcopy", lambda: dynamic(model), copy.deepcopy),
    ]
    for name, make, copy_of in ways:
        free()
        cache: Any = make()
        read = with_memory(
            lambda cache=cache: {"seconds": timed(lambda: generated(model, document, cache))[0]}, weights
        )
        free()
        held = gib(torch.cuda.memory_allocated() - weights)
        once = {
            **about,
            "prefill_s": round(read["seconds"], 4),
            "prefill_peak_gib": read["peak_gpu_gib"],
            "held_gib": held,
        }
        calls: dict[str, Callable[[], dict[str, Any]]] = {
            name: lambda cache=cache, copy_of=copy_of: answers(model, asked, cache, copy_of)
        }
        if name == "forks":
            calls["forks, all alive"] = lambda cache=cache, copy_of=copy_of: answers(model, asked, cache, copy_of, [])
            calls["forks, one batch"] = lambda cache=cache: batched(model, asked, cache)
        for kind, call in calls.items():
            free()
            yield f"questions, {kind}", answered(once, call, weights)
        del cache, calls, call
    free()
    one = with_memory(
        lambda: {"seconds": timed(lambda: generated(model, asked[0], dynamic(model), ANSWER))[0]}, weights
    )
    seconds = round(one["seconds"] * QUESTIONS, 4)
    yield "questions, prefills", {
        **about, "measured": 1, "times": QUESTIONS, "one_s": round(one["seconds"], 4), "seconds": seconds,
        "peak_gib": one["peak_gpu_gib"],
    }  # fmt: skip


def answers(
    model: Any, asked: list[Tensor], cache: Any, copy_of: Callable[[Any], Any], alive: list[Any] | None = None
) -> dict[str, float]:  # fmt: skip
    """Seconds of all copies and of all answers.

    Args:
        alive: where copies live on; None if each ends behind its answer.
    """
    copies = replies = 0.0
    for ids in asked:
        seconds, twin = timed(lambda: copy_of(cache))
        copies += seconds
        replies += timed(partial(generated, model, ids, twin, ANSWER))[0]
        if alive is not None:
            alive.append(twin)
        del twin
    return {"copies_s": round(copies, 5), "answers_s": round(replies, 4)}


def batched(model: Any, asked: list[Tensor], cache: Any) -> dict[str, float]:
    """Seconds of a fork to as many sequences as there are questions, and of one call that answers all."""
    ids = torch.cat(asked)
    copies, twin = timed(lambda: cache.fork(len(asked)))
    return {
        "copies_s": round(copies, 5),
        "answers_s": round(timed(lambda: generated(model, ids, twin, ANSWER))[0], 4),
    }


def answered(once: dict[str, Any], call: Callable[[], dict[str, Any]], weights: int) -> dict[str, Any]:
    """A row: the prefill and the answers in all, and the peak behind the prefill over what the prefilled cache holds."""
    try:
        made = with_memory(call, weights)
    except Exception as error:
        return once | failure(error)
    peak, held = made["peak_gpu_gib"], once["held_gib"]
    return {
        **once, "copies_s": made["copies_s"], "answers_s": made["answers_s"],
        "seconds": round(once["prefill_s"] + made["copies_s"] + made["answers_s"], 4), "peak_gib": peak,
        "memory_ratio": round(peak / held, 4) if held else None,
    }  # fmt: skip


class FirstToken(BaseStreamer):
    """Notes when the first new token has come."""

    def __init__(self) -> None:
        self.calls, self.at = 0, 0.0

    def put(self, value: Tensor) -> None:
        """Called with the prompt, then with each token, in host memory."""
        self.calls += 1
        if self.calls == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        """Called at the end."""


def agent_loop(run: Run) -> Rows:
    """Time to the first token, over all turns of a history that grows."""
    start = max(BLOCK, run.tokens // 32)
    stop = max(2 * start, run.tokens * 60 // 128)
    lengths = [start + (stop - start) * turn // (TURNS - 1) for turn in range(TURNS)]
    about = {"turns": TURNS, "first_tokens": start, "last_tokens": stop, "new_tokens": REPLY}
    yield "agent loop, by hand", about | turns(run.model, lengths, lambda: dynamic(run.model), kept=True)
    free()
    yield "agent loop, none kept", about | turns(run.model, lengths, lambda: dynamic(run.model))
    free()
    store = PromptStore(max_host_bytes=MEMORY_CAP)
    with enable(run.model, store=store):
        row = turns(run.model, lengths, lambda: None)
    stats = store.stats()
    yield "agent loop, store", about | row | {"hits": stats.hits, "reused_tokens": stats.reused_tokens}


def turns(model: Any, lengths: list[int], make: Callable[[], Any], kept: bool = False) -> dict[str, Any]:
    """Seconds to the first token and to the last one, over all turns.

    Args:
        lengths: of the prompt of each turn: all before it, the reply, and random tokens.
        make: makes the cache of a turn; None in its place for the model's own.
        kept: whether the first turn's cache is that of all turns.
    """
    history, first, whole = prompt(model, 0), [], 0.0
    cache = make() if kept else None
    for length in lengths:
        history = torch.cat([history, prompt(model, length - history.shape[1])], 1)
        streamer = FirstToken()
        wait_for_device()
        started = time.perf_counter()
        seconds, history = timed(
            partial(generated, model, history, cache if kept else make(), REPLY, streamer=streamer)
        )
        first.append(streamer.at - started)
        whole += seconds
    return {
        "seconds": round(sum(first), 4), "last_turn_s": round(first[-1], 4), "with_replies_s": round(whole, 4),
        "each_s": [round(each, 4) for each in first],
    }  # fmt: skip


PARTS: dict[str, Callable[[Run], Rows]] = {
    "prefill": prefill,
    "fork": fork,
    "questions": questions,
    "memory store": memory_store,
    "agent loop": agent_loop,
    "lookup": lookup,
    "disk store": partial(disk_store, method="fitted"),
    "disk store, shadowkv": partial(disk_store, method="shadowkv", gpu_memory="2GiB"),
}


def warm_up(run: Run, parts: list[str]) -> None:
    """Compile kernels and fill the allocator, with a short document."""
    document = prompt(run.model, min(WARM_TOKENS, run.tokens))
    for method in ["fitted"] + ["shadowkv"] * ("disk store, shadowkv" in parts):
        store = PromptStore(max_host_bytes=MEMORY_CAP)
        cache = SpinCache(run.model, method, store=store)
        generated(run.model, document, cache)
        generated(run.model, longer(run.model, document), cache.fork(), ANSWER)
        generated(run.model, longer(run.model, document), SpinCache(run.model, method, store=store), 2)
    generated(run.model, document, dynamic(run.model), 2)
    free()


def measure(run: Run, parts: list[str], put: Callable[[str, dict[str, Any]], object]) -> None:
    """Measure parts, and call `put` with the name of each row and the row. A part that fails is a row too."""
    for part in parts:
        if time.monotonic() > run.until:
            return
        began = time.monotonic()
        try:
            for name, row in PARTS[part](run):
                put(name, row)
        except Exception as error:
            put(f"{part}, failure", failure(error))
        free()
        print(f"{part}: {time.monotonic() - began:.1f} s in all", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    until = time.monotonic() + given.seconds
    transformers.utils.logging.set_verbosity_error()
    about = {
        "shape": given.shape, "dtype": "bfloat16", "machine": torch.cuda.get_device_name(), "sources": fingerprint(),
        "versions": {name: version(name) for name in ("torch", "transformers", "triton")},
        "python": platform.python_version(),
    }  # fmt: skip
    command = command_line("speed.prefixes", None)
    for option, value in (("--output", given.output), ("--folder", given.folder)):
        command = command.replace(f" {option} {value}", "")
    rows = RowsFile(given.output or RESULTS / "h200" / f"prefixes-{given.shape}.json", about, command)

    def put(name: str, row: dict[str, Any]) -> None:
        rows.put(name, row)
        print(name, row, flush=True)

    model = build(given.shape)
    with tempfile.TemporaryDirectory(prefix="prefixes-", dir=given.folder) as folder:
        run = Run(model, given.tokens, Path(folder), until)
        warm_up(run, given.only)
        print(f"warm after {time.monotonic() - until + given.seconds:.1f} s", flush=True)
        measure(run, given.only, put)


if __name__ == "__main__":
    main()
