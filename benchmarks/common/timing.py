"""Time per output token under `generate`, of one sequence or a batch, and the memory that goes with it."""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

import spin_hf

FEW, MANY, TIMES = 8, 72, 3
PACKAGE = Path(spin_hf.__file__).parent


def generate(
    model: Any, cache: Cache, held: int, count: int, *, batch: int = 1, padding: Tensor | None = None, **options: Any
) -> float:  # fmt: skip
    """Seconds of a call that generates `count` tokens behind the `held` tokens of each sequence of the cache.

    Args:
        padding: [batch], how many tokens in front of each sequence are padding; None for none.
    """
    vocab = model.config.vocab_size
    ids = torch.randint(vocab // 2, vocab, (batch, 1), device=model.device)  # new ones, as the mask is longer
    mask = torch.ones((batch, held + 1), dtype=torch.long, device=model.device)
    if padding is not None:
        mask = (torch.arange(held + 1, device=ids.device) >= padding.to(ids.device).unsqueeze(1)).long()
    wait_for_device()
    started = time.perf_counter()
    model.generate(
        ids, past_key_values=cache, max_new_tokens=count, do_sample=False, attention_mask=mask, **options,
    )  # fmt: skip
    wait_for_device()
    return time.perf_counter() - started


def tpot(
    model: Any, cache: Cache, held: int, *, few: int = FEW, many: int = MANY, times: int = TIMES, warm: int = 0,
    before_timed: Callable[[], object] = lambda: None, **options: Any,
) -> dict[str, float]:  # fmt: skip
    """Milliseconds per step, a token of each sequence: (`generate` with `many` new tokens - with `few`) / their difference.

    The first call, of `few` tokens, is timed by itself: it compiles or captures what is to be.

    Args:
        held: tokens in the cache; the calls go on from there.
        times: the median of so many.
        warm: tokens generated after the first call and before what counts.
        before_timed: called between the two.
        options: `batch` and `padding` as for `generate`, and what that is called with.
    """

    def run(count: int) -> float:
        nonlocal held
        held += count
        return generate(model, cache, held - count, count, **options)

    first = run(few)
    for start in range(0, warm, many):
        run(min(many, warm - start))
    before_timed()
    took = [(run(many) - run(few)) / (many - few) * 1e3 for _ in range(times)]
    return {
        "tpot_ms": round(statistics.median(took), 3), "spread_ms": round(max(took) - min(took), 3),
        "first_call_s": round(first, 3), "timed_tokens": times * (many + few), "warm_tokens": few + warm,
    }  # fmt: skip


def wait_for_device() -> None:
    """Wait until the GPU has done all that was launched; nothing without a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def with_memory(measure: Callable[[], dict[str, Any]], weights_bytes: int) -> dict[str, Any]:
    """A row with the memory that it took: most of the GPU's beside the weights, and the host's as it is afterwards."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    row = measure()
    pinned = getattr(torch.cuda, "host_memory_stats", dict)().get("allocated_bytes.current", 0)
    return {
        **row, "peak_gpu_gib": round((torch.cuda.max_memory_allocated() - weights_bytes) / 2**30, 2),
        "rss_gib": round(resident_bytes() / 2**30, 2), "torch_pinned_gib": round(pinned / 2**30, 2),
    }  # fmt: skip


def resident_bytes() -> int:
    """Host memory of this process, page-locked slabs of the cache included."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmRSS"))


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` gives, or why there is nothing; frees what it left."""
    try:
        result = measure()
    except Exception as error:
        result = {"tpot_ms": None, **failure(error)}
    free()
    return result


def failure(error: Exception) -> dict[str, str]:
    """Why there is no result: `why` where it does not fit, which is a result too, else `failed`."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return {"why": "out of GPU memory"}
    traceback.print_exception(error)
    return {"failed": f"{type(error).__name__}: {str(error).strip()[:300]}"}


def where(error: Exception) -> dict[str, str]:
    """The first line of an error's message, and where it was raised: the innermost frame of the package, if there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)] or frames
    made = {"message": next(iter(str(error).splitlines()), repr(error))[:300]}
    if inside:
        file = Path(inside[-1].filename)
        shown = file.relative_to(PACKAGE.parent) if file.is_relative_to(PACKAGE) else file.name
        made["where"] = f"{shown}:{inside[-1].lineno} {inside[-1].name}"
    return made


def free() -> None:
    """Give back all that nobody refers to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
