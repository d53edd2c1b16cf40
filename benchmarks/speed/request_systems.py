"""Systems that serve a load of requests, and the times that they take.

spin loop       `RequestLoop`: requests arrive when the load says, and join and leave
spin static     `SpinCache` and `generate`, batches as large as the loop's; one batch is measured
transformers    the continuous batching of transformers, with the fastest attention that can be had here
dense times     prompts under SDPA, steps of flash decoding in a CUDA graph: simulated with (`request_loads.py`)
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from benchmarks.common.timing import free, wait_for_device
from benchmarks.speed.request_loads import Arrival, DenseTimes, figures
from spin_hf import EventLog, RequestLoop, RequestResult, SpinCache, generate_batch
from spin_hf.serving.events import StepDone

BATCHING: Any = None
"""A `ContinuousBatchingConfig` of transformers; None for `sized_by_free_memory`."""
_SHARE = 0.9
"""Of free memory, as transformers chooses."""
_WORKING_BYTES = 4 << 30
"""GPU memory that a dense system leaves for activations."""


def prompts_of(arrivals: Sequence[Arrival], vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Random ids of each request."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randint(1, vocabulary, (max(each.shared for each in arrivals),), generator=generator).tolist()
    return [
        shared[: each.shared] + torch.randint(1, vocabulary, (each.prompt - each.shared,), generator=generator).tolist()
        for each in arrivals
    ]


# ---------------------------------------------------------------------------------------------------------- spin's own


def spin_loop(
    model: Any, arrivals: Sequence[Arrival], method: str, budget: int, until: float, max_slowdown: float | None, **options: Any
) -> dict[str, Any]:  # fmt: skip
    """The row of a loop.

    Args:
        until: `time.perf_counter()` at which what runs is cancelled.
        max_slowdown, options: as for `RequestLoop`.
    """
    prompts = prompts_of(arrivals, model.config.vocab_size)
    log = EventLog()
    with RequestLoop(
        model, method, budget=budget, max_slowdown=max_slowdown, max_wait_s=None, events=log, **options
    ) as loop:
        prepared = [
            loop.unchecked(prompt, max_new_tokens=each.output, do_sample=False)
            for prompt, each in zip(prompts, arrivals, strict=True)
        ]
        for request in prepared:
            loop.check(request)
        began, longest = time.perf_counter(), 0
        for request, each in zip(prepared, arrivals, strict=True):
            time.sleep(max(0.0, began + each.at - time.perf_counter()))
            loop.enqueue([request])
            longest = max(longest, loop.stats().waiting)
        for request in prepared:
            if not request.handle.wait(max(0.1, until - time.perf_counter())):
                loop.cancel_all()
        results = [request.handle.outcome(600) for request in prepared]
        stats = loop.stats()
    starts = [request.submitted - began for request in prepared]
    failed = [result for result in results if result.error is not None]
    if failed:
        raise failed[0].error  # type: ignore[misc]
    return {
        **_figures(arrivals, results, starts), **_of_steps(log), "longest_queue": longest, "paused": stats.paused,
        "reused_tokens": stats.reused_tokens, "mean_rows": round(stats.mean_rows, 1),
    }  # fmt: skip


def warm_up(model: Any, method: str, budget: int, tokens: int = 32768) -> None:
    """Compile the kernels of rows, for pages on the GPU and in host memory, so that no load waits for that."""
    prompts = [torch.randint(1, model.config.vocab_size, (tokens,)) for _ in range(2)]
    for options in ({}, {"gpu_memory": "4GiB"}):
        generate_batch(model, prompts, method=method, budget=budget, max_new_tokens=8, progress=False, **options)
        free()


def _figures(arrivals: Sequence[Arrival], results: Sequence[RequestResult], starts: Sequence[float]) -> dict[str, Any]:
    """The figures of the requests that had a token; how many had not, and how many were cut off."""
    have = [index for index, result in enumerate(results) if result.tokens]
    times = [
        (starts[i] + results[i].times.tokens[0], starts[i] + results[i].times.tokens[-1], len(results[i].tokens))
        for i in have
    ]
    cut = sum(result.finish_reason == "cancelled" for result in results)
    return {**figures([arrivals[i] for i in have], times), "cut_off": cut, "asked": len(results)}


def _of_steps(log: EventLog) -> dict[str, Any]:
    """The decode rate with nearly as many rows as there ever were, and the time of those steps."""
    steps = [event for event in log.events if isinstance(event, StepDone)]
    if not steps:
        return {}
    most = max(step.rows for step in steps)
    full = [step for step in steps if step.rows >= 0.9 * most]
    seconds = sum(step.seconds for step in full)
    return {
        "most_rows": most, "full_steps": len(full), "full_tokens_per_s": round(sum(step.rows for step in full) / seconds, 1),
        "full_step_ms": round(seconds / len(full) * 1e3, 2), "gpu_gib": round(max(step.gpu_bytes for step in steps) / 2**30, 2),
        "cpu_gib": round(max(step.cpu_bytes for step in steps) / 2**30, 2),
    }  # fmt: skip


def spin_static(
    model: Any, arrivals: Sequence[Arrival], method: str, budget: int, batch: int, few: int = 8, many: int = 48
) -> dict[str, Any]:
    """The row of static batches: one of `batch` sequences of the load's longest prompt is read, and its steps timed."""
    free()
    width = max(each.prompt for each in arrivals)
    cache, ids = SpinCache(model, method, budget=budget), torch.randint(1, model.config.vocab_size, (batch, width))
    seconds: list[float] = []
    for number in (few, few, many):
        wait_for_device()
        began = time.perf_counter()
        output = model.generate(
            ids.to(model.device), attention_mask=torch.ones(output_shape(ids), device=model.device, dtype=torch.int64),
            past_key_values=cache, max_new_tokens=number, do_sample=False,
        )  # fmt: skip
        wait_for_device()
        seconds.append(time.perf_counter() - began)
        ids = output
    step = (seconds[2] - seconds[1]) / (many - few)
    prompt = max(0.0, seconds[0] - few * step) / batch / width
    times = DenseTimes(step, 0.0, prompt, 0.0, batch * (width + many))
    return {
        "batch": batch, "full_tokens_per_s": round(batch / step, 1), "full_step_ms": round(step * 1e3, 2),
        "prompt_s": round(prompt * width, 3), "times": times,
    }  # fmt: skip


def output_shape(ids: torch.Tensor) -> tuple[int, int]:
    """Shape of the mask of a prompt."""
    return ids.shape[0], ids.shape[1]


# --------------------------------------------------------------------------------------------------------------- rivals


def dense_times(model: Any, lengths: Sequence[int] = (8192, 32768)) -> DenseTimes:
    """Measure prompts and steps of dense attention. Needs a GPU."""
    from benchmarks.speed.rivals import measure_rival  # needs Triton

    took = [_prompt_seconds(model, length) for length in lengths]
    (a, b), (s, t) = lengths, took
    pair = max(0.0, (t / b - s / a) / (b - a))
    steps = [
        measure_rival(model, "dense graph", tokens, 0, batch)["tpot_ms"] / 1e3
        for tokens, batch in ((8192, 1), (32768, 8))
    ]
    token = max(0.0, (steps[1] - steps[0]) / (8 * 32768 - 8192))
    free()
    return DenseTimes(steps[0] - 8192 * token, token, s / a - a * pair, pair, room_tokens(model))


def _prompt_seconds(model: Any, length: int) -> float:
    ids = torch.randint(1, model.config.vocab_size, (1, length), device=model.device)
    took = []
    for _ in range(2):
        wait_for_device()
        began = time.perf_counter()
        with torch.no_grad():
            model(ids, logits_to_keep=1)
        wait_for_device()
        took.append(time.perf_counter() - began)
        free()
    return min(took)


def room_tokens(model: Any) -> int:
    """Tokens of keys and values that GPU memory holds beside the weights and activations."""
    config = model.config
    free_bytes, total = torch.cuda.mem_get_info()
    limit = int(total * torch.cuda.get_per_process_memory_fraction()) - torch.cuda.memory_allocated()
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    each = config.num_hidden_layers * config.num_key_value_heads * 2 * dim * config.dtype.itemsize
    return max(1, (min(free_bytes, limit) - _WORKING_BYTES) // each)


def fastest_attention() -> str:
    """The attention that transformers' continuous batching is measured with: flash attention if its package is there."""
    for name, module in (("flash_attention_3", "flash_attn_interface"), ("flash_attention_2", "flash_attn")):
        if importlib.util.find_spec(module) is not None:
            return name
    return "sdpa"


def sized_by_free_memory() -> Any:
    """The sizes that transformers chooses, within the memory that this process may still take.

    By itself it looks at what the whole GPU has free.
    """
    if not torch.cuda.is_available():
        return None
    free()
    unused, total = torch.cuda.mem_get_info()
    left = total * torch.cuda.get_per_process_memory_fraction() - torch.cuda.memory_reserved()
    return ContinuousBatchingConfig(max_memory_percent=_SHARE * min(1.0, left / unused))


def transformers_batching(model: Any, arrivals: Sequence[Arrival], until: float) -> dict[str, Any]:
    """The row of transformers' continuous batching, every request with its own `max_new_tokens`.

    Its manager is made before the clock starts. What has not ended at `until` is cut off.
    """
    prompts, attention = prompts_of(arrivals, model.config.vocab_size), fastest_attention()
    before = model.config._attn_implementation
    config = GenerationConfig(do_sample=False, max_new_tokens=max(each.output for each in arrivals), eos_token_id=-1)
    times: dict[int, tuple[float, float, int]] = {}
    try:
        model.set_attn_implementation(attention)
        with model.continuous_batching_context_manager(
            generation_config=config, timeout=5, continuous_batching_config=BATCHING or sized_by_free_memory()
        ) as manager:
            began = time.perf_counter()
            for number, (prompt, each) in enumerate(zip(prompts, arrivals, strict=True)):
                time.sleep(max(0.0, began + each.at - time.perf_counter()))
                manager.add_request(
                    prompt, str(number), max_new_tokens=each.output, record_timestamps=True, eos_token_id=-1
                )
            while len(times) < len(prompts) and time.perf_counter() < until:
                result = manager.get_result(timeout=0.5)
                if result is None:
                    if not manager.is_running():
                        raise RuntimeError("the thread of transformers' continuous batching has ended")
                    continue
                if result.error is not None:
                    raise RuntimeError(result.error)
                if result.is_finished():
                    stamps = [stamp - began for stamp in result.timestamps or [time.perf_counter()]]
                    times[int(result.request_id)] = stamps[0], stamps[-1], len(result.generated_tokens)
    finally:
        model.set_attn_implementation(before)
        free()
    if not times:
        return {"attention": attention, "why": "no request ended within the time"}
    done = sorted(times)
    return {
        "attention": attention, **figures([arrivals[i] for i in done], [times[i] for i in done]),
        "cut_off": len(prompts) - len(done), "asked": len(prompts),
    }  # fmt: skip
