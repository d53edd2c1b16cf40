"""Every way to use a cache by hand: loops over `model(...)`, the cache's own operations, copies, compilation."""

from __future__ import annotations

from typing import Any

import torch
from torch._dynamo.utils import counters

from tests.support.compare import Trace
from tests.support.runs import advance, decode, generate, mode
from tests.support.subjects import Subject, dense_subject
from tests.support.zoo import left_padded, random_tokens


@mode
def bare_loop(subject: Subject) -> Trace:
    """No masks, no positions; several tokens at once in the middle."""
    trace, cache = Trace(), subject.new()
    token = advance(subject, cache, random_tokens(2, 59), trace, "prefill")
    decode(subject, cache, token, trace, "decode", 6)
    token = advance(subject, cache, random_tokens(2, 11, seed=1), trace, "11 tokens")
    decode(subject, cache, token, trace, "decode again", 8)
    return trace


@mode
def bare_loop_padded(subject: Subject) -> Trace:
    """A mask that grows by hand; positions are left to the model."""
    trace, cache = Trace(), subject.new()
    ids, mask = left_padded([52, 37, 45])
    token = advance(subject, cache, ids, trace, "prefill", valid=mask, attention_mask=mask)
    for step in range(9):
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        trace.add_tokens(f"decode {step}", token)
        token = advance(subject, cache, token, trace, f"decode {step}", attention_mask=mask)
    return trace


@mode
def crop(subject: Subject) -> Trace:
    """Back by less than a page and by several, as assisted decoding does: a crop (even of 0) after each forward."""
    trace, cache = Trace(), subject.new()
    cache.activate_past_recording()
    token = advance(subject, cache, random_tokens(2, 62), trace, "prefill")
    cache.crop(0)
    for turn, removed in enumerate([3, 17, 1, 26]):
        trace.add_tokens(f"before crop {turn}", token)
        token = advance(subject, cache, token, trace, f"before crop {turn}")
        cache.crop(0)
        token = advance(subject, cache, random_tokens(2, removed + 2, seed=turn), trace, f"to be cropped {turn}")
        cache.crop(-removed)
        assert cache.get_seq_length() == 62 + 3 * (turn + 1)
    for step in range(5):
        trace.add_tokens(f"end {step}", token)
        token = advance(subject, cache, token, trace, f"end {step}")
        cache.crop(0)
    return trace


@mode
def crop_into_prompt(subject: Subject) -> Trace:
    """Back past all that was generated and a part of the prompt, with no crop in between."""
    trace, cache = Trace(), subject.new()
    cache.activate_past_recording()
    token = advance(subject, cache, random_tokens(1, 71), trace, "prefill")
    token = decode(subject, cache, token, trace, "decode", 9)
    cache.crop(-38)
    token = advance(subject, cache, random_tokens(1, 21, seed=1), trace, "other tokens")
    cache.crop(0)
    decode(subject, cache, token, trace, "end", 6)
    return trace


@mode
def reset(subject: Subject) -> Trace:
    """An emptied cache serves another batch size."""
    trace, cache = Trace(), subject.new()
    trace.add_generated("first", generate(subject, random_tokens(2, 58), cache, new_tokens=5))
    for turn, rows in enumerate((3, 1)):
        cache = subject.restart(cache)
        assert cache.get_seq_length() == 0
        ids, mask = left_padded([48, 51, 40][:rows], seed=turn)
        trace.add_generated(f"{rows} rows", generate(subject, ids, cache, attention_mask=mask, new_tokens=10))
    return trace


@mode
def reorder(subject: Subject) -> Trace:
    trace, cache = Trace(), subject.new()
    token = advance(subject, cache, random_tokens(3, 51), trace, "prefill")
    for turn, order in enumerate(([2, 0, 0], [1, 2, 1], [0, 1, 2], [2, 2, 2])):
        token = decode(subject, cache, token, trace, f"turn {turn}", 3)
        cache.reorder_cache(torch.tensor(order))
        token = random_tokens(3, 1, seed=turn)  # rows with the same past part again
    decode(subject, cache, token, trace, "end", 9)
    return trace


@mode
def select(subject: Subject) -> Trace:
    trace, cache = Trace(), subject.new()
    token = advance(subject, cache, random_tokens(4, 50), trace, "prefill")
    token = decode(subject, cache, token, trace, "4 rows", 3)
    for rows in ([3, 1], [1]):
        cache.batch_select_indices(torch.tensor(rows))
        token = decode(subject, cache, token[rows], trace, f"rows {rows}", 9)
    return trace


@mode
def repeat(subject: Subject) -> Trace:
    """One prefill for three continuations each; `generate` goes on from there."""
    trace, cache = Trace(), subject.new()
    ids = random_tokens(2, 54)
    advance(subject, cache, ids, trace, "prefill")
    cache.batch_repeat_interleave(3)
    ids = torch.cat([ids.repeat_interleave(3, dim=0), random_tokens(6, 4, seed=1)], dim=1)
    trace.add_generated("6 rows", generate(subject, ids, cache))
    return trace


@mode
def prefix_copy(subject: Subject) -> Trace:
    """A prefilled cache is copied for every prompt that starts with it, and stays as it was."""
    trace, prefix_cache = Trace(), subject.new()
    prefix = random_tokens(1, 53)
    advance(subject, prefix_cache, prefix, trace, "prefix")
    for prompt in range(2):
        ids = torch.cat([prefix, random_tokens(1, 9, seed=prompt + 1)], dim=1)
        trace.add_generated(f"prompt {prompt}", generate(subject, ids, subject.clone(prefix_cache), new_tokens=12))
        assert prefix_cache.get_seq_length() == 53
    ids = torch.cat([prefix, random_tokens(1, 5, seed=3)], dim=1)
    trace.add_generated("the original", generate(subject, ids, prefix_cache, new_tokens=12))
    return trace


@mode
def from_cache(subject: Subject) -> Trace:
    """A DynamicCache with padding in it is taken over, then goes on with several tokens."""
    trace, oracle = Trace(), dense_subject(subject.family)
    ids, mask = left_padded([64, 57])
    dynamic = oracle.new()
    output = generate(oracle, ids, dynamic, attention_mask=mask, new_tokens=5)
    cache = subject.adopt(dynamic)
    assert cache.get_seq_length() == 68
    ids = torch.cat([output.sequences, random_tokens(2, 6, seed=1)], dim=1)
    mask = torch.cat([mask, torch.ones_like(ids[:, mask.shape[1] :])], dim=1)
    trace.add_generated("taken over", generate(subject, ids, cache, attention_mask=mask))
    return trace


def _hiding_mask(rows: int, queries: int, keys: int, seed: int) -> torch.Tensor:
    """A 4-D additive mask [rows, 1, queries, keys]: causal, and every fourth older token or so hidden."""
    generator = torch.Generator().manual_seed(seed)
    query_position = torch.arange(keys - queries, keys)[:, None]
    key_position = torch.arange(keys)[None]
    hidden = torch.rand((rows, 1, queries, keys), generator=generator) < 0.25
    seen = (key_position <= query_position) & (~hidden | (key_position == query_position))
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)


@mode
def mask_4d(subject: Subject) -> Trace:
    """Custom masks at prefill, then none, then (where all layers see the same tokens) custom masks at decode."""
    trace, cache = Trace(), subject.new()
    token = advance(
        subject, cache, random_tokens(2, 57), trace, "prefill", attention_mask=_hiding_mask(2, 57, 57, seed=0)
    )
    token = decode(subject, cache, token, trace, "no mask", 4)
    if not any(cache.is_sliding):
        ids = random_tokens(2, 5, seed=1)
        token = advance(subject, cache, ids, trace, "5 tokens", attention_mask=_hiding_mask(2, 5, 66, seed=1))
        for step in range(8):
            trace.add_tokens(f"decode {step}", token)
            mask = _hiding_mask(2, 1, 67 + step, seed=2 + step)
            token = advance(subject, cache, token, trace, f"decode {step}", attention_mask=mask)
    return trace


def run_compiled(subject: Subject, backend: str = "eager") -> Trace:
    """Decode steps as `generate` makes them for a compiled forward; no step after the second may compile anything."""
    trace, cache = Trace(), subject.new()
    ids, mask = left_padded([61, 50])
    model, forward = subject.model, subject.compile(backend)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    graphs: list[int] = []

    def inputs(ids: torch.Tensor, first: bool) -> dict[str, Any]:
        return model.prepare_inputs_for_generation(
            ids,
            past_key_values=cache,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=True,
            is_first_iteration=first,
        )

    with torch.no_grad():
        logits = model(**inputs(ids, True)).logits[:, -1]
        trace.add_logits("prefill", logits)
        for step in range(12):
            token = logits.argmax(-1, keepdim=True)
            trace.add_tokens(f"decode {step}", token)
            mask = torch.cat([mask, torch.ones_like(token)], dim=1)
            position_ids = position_ids[:, -1:] + 1
            with torch._dynamo.config.patch(error_on_recompile=step > 1):
                logits = forward(**inputs(token, False)).logits[:, -1]
            trace.add_logits(f"decode {step}", logits)
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1:] == graphs[1:2] * len(graphs[1:]), f"graphs after each step: {graphs}"
    return trace


@mode
def compiled(subject: Subject) -> Trace:
    return run_compiled(subject)
