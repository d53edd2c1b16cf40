"""Prompts that a `PromptStore` restores: from memory, from disk, and how long finding them takes. Parts of `prefixes.py`."""

from __future__ import annotations

import os
import random
import shutil
import statistics
import threading
import time
import weakref
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.common.shapes import fill_spin
from benchmarks.common.timing import free, wait_for_device
from benchmarks.speed.prefill import prompt
from spin_hf import PromptStore, SpinCache
from spin_hf.persistence.checksum import piece_checksum
from spin_hf.persistence.prefix_index import PrefixIndex
from spin_hf.persistence.prompt_identity import only_row, space_of, with_options
from spin_hf.persistence.prompt_store import _Held
from spin_hf.persistence.shards import bytes_of
from spin_hf.storage.host_register import CudaRegistrar
from spin_hf.storage.pinned_slab import HostSlab

BLOCK = 256
"""Tokens of a block of a store."""
QUESTION, HITS, LOOKUPS, PREFIXES = 64, 3, 20, 1000
"""New tokens behind a stored prompt, hits of a store and lookups whose median counts, and prefixes in the index."""
THREADS, READ_BYTES, HASH_BYTES = 8, 8 << 20, 512 << 20
MEMORY_CAP = "64GiB"
Rows = Iterator[tuple[str, dict[str, Any]]]
"""Names and rows, each after its measurement."""


@dataclass(frozen=True)
class Run:
    """What the parts measure.

    Attributes:
        model: the model.
        tokens: of the document.
        folder: for stores on disk.
        until: no measurement that can be left out starts behind this `time.monotonic()`.
    """

    model: Any
    tokens: int
    folder: Path
    until: float = float("inf")


class TimedStore(PromptStore):
    """A store that notes the seconds of its last `restore` and `keep`."""

    restore_s = keep_s = 0.0

    def restore(self, cache: Any, ids: Tensor, mask: Tensor | None) -> None:
        self.restore_s, _ = timed(partial(super().restore, cache, ids, mask))

    def keep(self, cache: Any, ids: Tensor, mask: Tensor | None) -> None:
        self.keep_s, _ = timed(partial(super().keep, cache, ids, mask))


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the device has done what a call launched, and what the call gives."""
    wait_for_device()
    started = time.perf_counter()
    result = call()
    wait_for_device()
    return time.perf_counter() - started, result


def generated(model: Any, ids: Tensor, cache: Any, new: int = 1, **options: Any) -> Any:
    """The output of one call of `generate` with a cache; None for the model's own choice."""
    with torch.no_grad():
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=new, do_sample=False, **options
        )  # fmt: skip


def first_token(model: Any, ids: Tensor, make: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds to make a cache and the first token, and the cache."""

    def call() -> Any:
        cache = make()
        generated(model, ids, cache)
        return cache

    return timed(call)


def longer(model: Any, document: Tensor) -> Tensor:
    """A prompt that begins with the document and goes on with random tokens."""
    return torch.cat([document, prompt(model, QUESTION)], 1)


def hit(model: Any, store: TimedStore, ids: Tensor, **options: Any) -> dict[str, float]:
    """Seconds to the first token of a prompt that the store restores but for its last tokens.

    Raises:
        RuntimeError: fewer tokens were restored.
    """
    free()
    before = store.stats().reused_tokens
    seconds = first_token(model, ids, lambda: SpinCache(model, store=store, **options))[0]
    reused, expected = store.stats().reused_tokens - before, ids.shape[1] - QUESTION
    if reused < expected:
        raise RuntimeError(f"expected {expected} tokens from the store, got {reused}")
    return {"seconds": seconds, "restore_s": store.restore_s, "keep_s": store.keep_s, "reused_tokens": reused}


def median_of(hits: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of several hits, and the seconds of each."""
    medians = {name: round(statistics.median(each[name] for each in hits), 4) for name in hits[0]}
    return medians | {"each_s": [round(each["seconds"], 4) for each in hits]}


def memory_store(run: Run) -> Rows:
    """Time to the first token of a prompt that a store in memory holds."""
    model, store = run.model, TimedStore(max_host_bytes=MEMORY_CAP)
    document = prompt(model, run.tokens)
    free()
    seconds = first_token(model, document, lambda: SpinCache(model, store=store))[0]
    about = {"tokens": run.tokens, "stored_gib": gib(store.stats().stored_bytes)}
    yield "memory store, first call", about | {"seconds": round(seconds, 4), "keep_s": round(store.keep_s, 4)}
    hits = [hit(model, store, longer(model, document)) for _ in range(HITS)]
    yield "memory store, hit", about | {"new_tokens": QUESTION} | median_of(hits)


def gib(num_bytes: float) -> float:
    """Bytes in GiB, rounded."""
    return round(num_bytes / 2**30, 4)


# ----------------------------------------------------------------------------------------------------------- on disk


def disk_store(run: Run, method: str, **options: Any) -> Rows:
    """A store on disk: what storing adds, and the time to the first token with files in the page cache and without.

    `keep_s` is what the first token waits for, `stored_s` the time from the end of the call until the prompt is on the disk.
    """
    model, folder, document = run.model, run.folder / f"store-{method}", prompt(run.model, run.tokens)
    made = {"method": method, **options}
    about = {"tokens": run.tokens, **made}
    name = f"disk store, {method}"
    try:
        free()
        store = TimedStore(folder)
        seconds, cache = first_token(model, document, lambda: SpinCache(model, store=store, **made))
        stored_s, _ = timed(store.wait)
        host_bytes = cache.stats().cpu_bytes
        del cache
        entries = list((folder / "entries").iterdir())
        if not entries:
            raise RuntimeError("the store wrote no entry; its warning says why")
        files = sorted(entries[0].iterdir())
        size = sum(file.stat().st_size for file in files)
        yield f"{name}, first call", about | {
            "seconds": round(seconds, 3), "keep_s": round(store.keep_s, 3), "stored_s": round(stored_s, 3),
            "disk_gib": gib(size), "files": len(files), "host_gib": gib(host_bytes), "filesystem": filesystem(folder),
        }  # fmt: skip
        free()
        yield f"{name}, plain reads, warm", about | plain_reads(files)
        hits = [hit(model, TimedStore(folder), longer(model, document), **made) for _ in range(HITS)]
        yield f"{name}, hit, warm", about | {"new_tokens": QUESTION} | median_of(hits)
        for verify in (True, False):
            free()
            seconds, cache = timed(
                partial(SpinCache.from_pretrained, entries[0], model, verify=verify, **made)  # type: ignore[arg-type]
            )
            del cache
            yield f"{name}, from_pretrained, warm, verify={verify}", about | {"seconds": round(seconds, 4)}
        free()
        yield f"{name}, steps by themselves", about | steps(model, host_bytes, size)
        if time.monotonic() < run.until:
            evict(files)
            yield f"{name}, plain reads, cold", about | plain_reads(files)
        if time.monotonic() < run.until:
            evict(files)
            cold = hit(model, TimedStore(folder), longer(model, document), **made)
            yield f"{name}, hit, cold", about | {"new_tokens": QUESTION} | median_of([cold])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def evict(files: list[Path]) -> None:
    """Have the system drop its copies of files from memory. A layer below it may still have some."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def plain_reads(files: list[Path]) -> dict[str, Any]:
    """Seconds to read files whole by 8 threads, each into a buffer of its own that it uses again and again."""
    held = threading.local()

    def read(piece: tuple[int, int]) -> int:
        if not hasattr(held, "buffer"):
            held.buffer = bytearray(READ_BYTES)
        return os.preadv(piece[0], [held.buffer], piece[1])

    with ExitStack() as opened:
        pieces: list[tuple[int, int]] = []
        for file in files:
            descriptor = os.open(file, os.O_RDONLY)
            opened.callback(os.close, descriptor)
            pieces += [(descriptor, at) for at in range(0, os.fstat(descriptor).st_size, READ_BYTES)]
        started = time.perf_counter()
        with ThreadPoolExecutor(THREADS) as pool:
            num_bytes = sum(pool.map(read, pieces))
        seconds = time.perf_counter() - started
    expected = sum(file.stat().st_size for file in files)
    if num_bytes != expected:
        raise RuntimeError(f"expected to read {expected} bytes, got {num_bytes}")
    return {"seconds": round(seconds, 4), "gb_s": round(num_bytes / seconds / 1e9, 3), "threads": THREADS}


def steps(model: Any, host_bytes: int, disk_bytes: int) -> dict[str, Any]:
    """What a restore does, each alone: checksums of as many bytes by 8 threads, copies to the GPU, page-locked memory.

    Args:
        host_bytes: page-locked memory that the cache takes.
        disk_bytes: bytes of the files.
    """
    buffer = torch.ones(HASH_BYTES, dtype=torch.uint8)
    pieces = buffer.split(4 << 20)
    with ThreadPoolExecutor(THREADS) as pool:
        hashed, _ = timed(lambda: list(pool.map(lambda piece: piece_checksum([bytes_of(piece)]), pieces)))
    row = {"checksum_s": round(hashed * disk_bytes / HASH_BYTES, 4), "threads": THREADS, "cores": os.cpu_count()}
    if model.device.type == "cuda":
        target = torch.empty_like(buffer, device=model.device)
        places = target.split(4 << 20)
        with ThreadPoolExecutor(THREADS) as pool:
            copied, _ = timed(lambda: list(pool.map(lambda place, piece: place.copy_(piece), places, pieces)))
        row["pageable_copy_gb_s"] = round(HASH_BYTES / copied / 1e9, 2)
        slab_s, slab = timed(lambda: HostSlab(HASH_BYTES, CudaRegistrar(model.device)).tensor)
        copied, _ = timed(lambda: target.copy_(slab, non_blocking=True))
        row |= {"page_locked_copy_gb_s": round(HASH_BYTES / copied / 1e9, 2), "page_lock_512_mib_s": round(slab_s, 4)}
        del slab
        if host_bytes:
            locked, slab = timed(lambda: HostSlab(host_bytes, CudaRegistrar(model.device)).tensor)
            row["page_lock_s"] = round(locked, 4)
    return row


def filesystem(folder: Path) -> str:
    """Type of the file system that a folder lies on."""
    with open("/proc/self/mounts") as mounts:
        found = [line.split()[1:3] for line in mounts]
    inside = [(len(place), kind) for place, kind in found if folder.resolve().is_relative_to(place)]
    return max(inside, default=(0, "unknown"))[1]


# ----------------------------------------------------------------------------------------------------------- lookups


def lookup(run: Run, prefixes: int = PREFIXES) -> Rows:
    """Milliseconds to find a prompt among stored prefixes that share blocks with it and with each other."""
    cache, ids = SpinCache(run.model), longer(run.model, prompt(run.model, run.tokens))
    space = space_of(cache)
    store = PromptStore(max_host_bytes=MEMORY_CAP)

    def hold(name: str, tokens: array[int]) -> None:
        store._memory.insert(name, with_options(space, cache), tokens, 1)
        store._held[name] = _Held(None, tokens, weakref.ref(run.model))  # type: ignore[arg-type]

    filled = fill_index(run, ids, prefixes, hold)
    yield "lookup, memory", filled | found(store, store._memory, with_options(space, cache), cache, ids)
    store._held.clear()
    folder = run.folder / "lookup"
    try:
        store = PromptStore(folder)
        assert store._disk is not None
        disk = store._disk.index
        filled = fill_index(run, ids, prefixes, lambda name, tokens: disk.insert(name, space, tokens, 1))
        save_tokens(folder / "entries" / "entry-0", ids[0, : run.tokens].cpu())
        yield "lookup, disk", filled | found(store, disk, space, cache, ids)
        disk.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fill_index(run: Run, ids: Tensor, prefixes: int, insert: Callable[[str, array[int]], object]) -> dict[str, Any]:
    """Insert "entry-0", which holds all of a prompt but its last tokens, and others that share fewer blocks with it."""
    document, draw = ids[0, : run.tokens].cpu(), random.Random(0)
    started = time.perf_counter()
    for number in range(prefixes):
        stored = document.clone()
        if number:
            own = draw.randrange(run.tokens // BLOCK * BLOCK)  # its own tokens from here on
            stored[own:] = torch.randint(0, run.model.config.vocab_size, (run.tokens - own,))
        insert(f"entry-{number}", array("q", stored.numpy().tobytes()))
    each = round((time.perf_counter() - started) / prefixes * 1e3, 3)
    return {"tokens": run.tokens, "prefixes": prefixes, "ms_per_insert": each}


def found(store: PromptStore, index: PrefixIndex, space: str, cache: Any, ids: Tensor) -> dict[str, Any]:
    """Milliseconds of `find`, the index alone, of `space_of`, the model's fingerprint, and of the whole lookup.

    The whole lookup is all that a restore does before it copies anything: these two, the tokens of the prompt as numbers, and
    comparing them with those of the entries found.

    Raises:
        RuntimeError: "entry-0" is not found.
    """

    def looked_up() -> Any:
        tokens = only_row(ids, torch.ones_like(ids))
        assert tokens is not None
        return store._candidates(cache, tokens, space_of(cache))

    row, expected = ids[0].tolist(), ids.shape[1] - QUESTION
    finds = [timed(lambda: index.find(space, row))[0] for _ in range(LOOKUPS)]
    named = [timed(lambda: space_of(cache))[0] for _ in range(LOOKUPS)]
    whole = [timed(looked_up) for _ in range(LOOKUPS)]
    best = whole[0][1][:1]
    if [each.name for each in best] != ["entry-0"] or best[0].common < expected:
        raise RuntimeError(f"expected entry-0 with {expected} tokens, got {best}")
    medians = {"find_ms": finds, "space_ms": named, "lookup_ms": [seconds for seconds, _ in whole]}
    return {name: round(statistics.median(taken) * 1e3, 3) for name, taken in medians.items()} | {"times": LOOKUPS}


def save_tokens(folder: Path, tokens: Tensor) -> None:
    """A saved cache with these tokens and a small model's keys and values: a lookup reads the tokens alone."""
    config = LlamaConfig(
        vocab_size=int(tokens.max()) + 1, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=1 << 20, dtype=torch.float32,
    )  # fmt: skip
    cache = SpinCache(AutoModelForCausalLM.from_config(config), "shadowkv")
    fill_spin(cache, config, len(tokens), "cpu")
    cache.save_pretrained(folder, tokens=tokens[None])
