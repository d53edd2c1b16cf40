"""How much of a step's selection the step before had selected too: measured, and set to what a real model shows.

    measured    share of the chosen pages that were among the chosen pages of the step before, as in `traces.py`: sinks
                and recent window left out, outliers included; mean over layers, KV heads and steps
    set         embedding of a token = what all tokens have in common + `spread` of its own
                spread 0: the same query at every step but for its position; 1: queries that have nothing to do with each other
                queries have energy only where RoPE turns by less than `FASTEST` a token, so that position alone turns
                them little
    replayed    the `spread` at which the overlap is what `traces.json` says of a real model, found by bisection

With `FASTEST` = 0.1 the overlap falls off with distance as a real model's does: simulated at 16,384 pages with the spread
that gives 75 % from step to step, 75, 63 and 40 % at distances of 4, 16 and 64; SmolLM2 69, 59 and 45 %.

Outlier pages (48 of the 256 that a budget of 2,048 tokens chooses) do not depend on the query, so the lowest possible
overlap is 19 % in a long context, and more in a short one, of which any two selections share a part.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.record import RESULTS
from benchmarks.common.shapes import head_dim, own_halves
from spin_hf import SpinCache
from spin_hf.kernels.descriptor_fields import StepField

TRACES = RESULTS / "traces.json"
FASTEST, NEARLY_STILL = 0.1, 1e-4
"""Radians that a query's fastest pair turns by from one token to the next, and the same for the highest overlap."""
PAGE_BITS = 0x3FFFFFFF
"""Of a listed page: its number. A higher bit may say that it is being loaded."""


def real_overlap(distance: int = 1) -> float:
    """The mean over all rows of `traces.json` (budgets of 128 to 512 tokens, the play's own tokens and greedy ones)."""
    rows = json.loads(TRACES.read_text())["rows"].values()
    found = [row["overlap"]["mean_at_distance"][str(distance)] for row in rows]
    return sum(found) / len(found)


# ------------------------------------------------------------------------------------------------------------- to set it


@torch.no_grad()
def set_spread(model: Any, spread: float, fastest: float = FASTEST) -> None:
    """Write embeddings and query projections, in place: graphs that read them stay valid.

    Args:
        spread: in [0, 1], how much of its length a token has for itself, beside what all have in common.
        fastest: radians; queries have no energy in pairs that RoPE turns by more from one token to the next.
    """
    table = model.get_input_embeddings().weight
    generator, half = torch.Generator(table.device).manual_seed(0), table.shape[1] // 2
    table[:, :half] = torch.randn(half, device=table.device, generator=generator) * (2 * (1 - spread**2)) ** 0.5
    for first, own in own_halves(table):
        table[first : first + len(own), half:] = own * 2**0.5 * spread
    weights = pair_weights(model.config, fastest, table.device)
    for index, layer in enumerate(model.model.layers):
        projection = layer.self_attn.q_proj.weight
        generator.manual_seed(1 + index)
        projection.normal_(0, 0.02, generator=generator)
        projection.view(-1, len(weights), projection.shape[1]).mul_(weights[:, None])


def pair_weights(config: Any, fastest: float, device: Any = "cpu") -> Tensor:
    """What each dimension of a query is multiplied by, [D], float32: its length stays, on average, what it was."""
    dim = head_dim(config)
    turns = float(config.rope_parameters["rope_theta"]) ** (-torch.arange(dim // 2, device=device) / (dim // 2))
    slow = turns <= fastest
    slow[-1] = True  # at least one pair
    return (slow * (len(slow) / slow.sum()) ** 0.5).repeat(2)


def find_spread(
    overlap_at: Callable[[float], float], target: float, tolerance: float = 0.012, most: int = 9, first: float = 0.2
) -> tuple[float, float]:
    """The spread at which `overlap_at`, which falls, comes to `target`, by bisection that begins at `first`.

    Returns:
        the spread, and the overlap measured there. Where no spread reaches the target, the end that comes closest.
    """
    low, high, middle, found = 0.0, 1.0, first, 0.0  # what a long context needs is near 0.2
    for _ in range(most):
        found = overlap_at(middle)
        if abs(found - target) <= tolerance:
            break
        low, high = (middle, high) if found > target else (low, middle)
        middle = (low + high) / 2
    return middle, found


# --------------------------------------------------------------------------------------------------------- to measure it


@contextmanager
def recorded_selections(cache: SpinCache, record: Callable[[int, Tensor], None]) -> Any:
    """While a model runs eager steps, call `record(layer, chosen)` after each layer: [B * KV heads, pages], bool."""
    passes, state = cache._passes, cache._state

    def recording(number: int, run: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            result = run(*args, **kwargs)
            kernels = passes.backends.in_use()[0]
            fixed = passes.zones.query(state.sequences.start, kernels.device).fixed
            fixed = fixed.repeat_interleave(kernels.num_heads, 0)
            record(number, chosen_pages(
                kernels.scratch[StepField.LIST_PAGE], kernels.buffers.list_count[:, 0], fixed, state.sequences.num_pages
            ))  # fmt: skip
            return result

        return recorded

    for number, layer in enumerate(cache.paged_layers):
        layer.run = recording(number, layer.run)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in cache.paged_layers:
            del layer.run


def chosen_pages(listed: Tensor, counts: Tensor, fixed: Tensor, num_pages: int) -> Tensor:
    """Which pages were chosen: [streams, num_pages], bool; a stream is a KV head of a sequence.

    Args:
        listed: [streams, n], int32: the pages attended to, -1 for none.
        counts: [streams]: how many of the entries count.
        fixed: [F] or [streams, F]: pages that every step attends to, -1 for none; left out.
    """
    there = (torch.arange(listed.shape[1], device=listed.device) < counts[:, None]) & (listed >= 0)
    pages = (listed & PAGE_BITS).long().where(there, num_pages)
    chosen = torch.zeros((len(listed), num_pages + 1), dtype=torch.bool, device=listed.device)
    chosen.scatter_(1, pages, True)
    chosen.scatter_(1, fixed.where(fixed >= 0, num_pages).expand(len(chosen), -1), False)
    return chosen[:, :num_pages]


@torch.no_grad()
def measure(model: Any, cache: SpinCache, steps: int = 6, distances: tuple[int, ...] = (1,)) -> dict[int, float]:
    """Overlap at each distance in steps, over `steps` eager greedy steps behind what the cache holds, padding included."""
    past: dict[int, list[Tensor]] = {}
    shares: dict[int, list[Tensor]] = {distance: [] for distance in distances}

    def record(number: int, chosen: Tensor) -> None:
        earlier = past.setdefault(number, [])
        for distance in distances:
            if len(earlier) >= distance:
                before = earlier[-distance]  # of a step with fewer pages, if a page was begun since
                shared = (chosen[:, : before.shape[1]] & before).sum(1)
                shares[distance].append((shared / chosen.sum(1).clamp(min=1)).mean())
        earlier.append(chosen)
        del earlier[: -max(distances)]

    with recorded_selections(cache, record):
        vocab, sequences = model.config.vocab_size, cache._state.sequences
        token = torch.randint(vocab // 2, vocab, (sequences.batch_size, 1), device=model.device)
        for _ in range(steps):
            valid = sequences.mask.valid
            mask = None if valid is None else torch.nn.functional.pad(valid, (0, 1), value=True).long()
            hidden = model.model(input_ids=token, attention_mask=mask, past_key_values=cache).last_hidden_state
            token = model.get_output_embeddings()(hidden[:, -1:]).argmax(-1)
    return {distance: float(torch.stack(found).mean()) for distance, found in shares.items()}
