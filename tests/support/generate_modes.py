"""Every way in which `generate` uses a cache.

A mode builds its own inputs (always the same), takes its caches from the subject, and records tokens and raw logits of
every step. Prompts have 40 to 90 tokens, answers 12 to 20: several pages of 8, never whole ones, and beyond the window
of models that have one.
"""

from __future__ import annotations

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from tests.support.compare import Trace
from tests.support.runs import generate, mode
from tests.support.subjects import Subject
from tests.support.zoo import PAD_TOKEN_ID, assistant_model, left_padded, random_tokens


@mode
def greedy(subject: Subject) -> Trace:
    trace = Trace()
    trace.add_generated("greedy", generate(subject, random_tokens(1, 69), subject.new(), new_tokens=20))
    return trace


@mode
def sampling(subject: Subject) -> Trace:
    trace = Trace()
    trace.add_generated(
        "sampling", generate(subject, random_tokens(2, 53), subject.new(), do_sample=True, top_k=20, temperature=0.8)
    )
    return trace


@mode
def beam_search(subject: Subject) -> Trace:
    ids, mask = left_padded([47, 40])
    trace = Trace()
    trace.add_generated(
        "beams", generate(subject, ids, subject.new(), attention_mask=mask, num_beams=3, num_return_sequences=2)
    )
    return trace


@mode
def return_sequences(subject: Subject) -> Trace:
    output = generate(subject, random_tokens(2, 45), subject.new(), do_sample=True, num_return_sequences=3)
    trace = Trace()
    trace.add_generated("3 answers each", output)
    return trace


@mode
def left_padding(subject: Subject) -> Trace:
    """Row 1 starts inside a page, row 2 is padded by several pages."""
    ids, mask = left_padded([73, 68, 41])
    trace = Trace()
    trace.add_generated("padded", generate(subject, ids, subject.new(), attention_mask=mask))
    return trace


class _EndRow(LogitsProcessor):
    """Makes one row end at a given length, whatever the model would say."""

    def __init__(self, row: int, length: int, eos_token_id: int) -> None:
        self.row, self.length, self.eos_token_id = row, length, eos_token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self.eos_token_id] = -torch.inf
        if input_ids.shape[1] == self.length:
            scores[self.row] = -torch.inf
            scores[self.row, self.eos_token_id] = 0.0
        return scores


@mode
def holes(subject: Subject) -> Trace:
    """Row 0 ends early and is padded to the end of the turn; the next turn's mask hides that padding, and its own."""
    eos, trace, cache = 1, Trace(), subject.new()
    ids, mask = left_padded([49, 43, 46])
    for turn in range(3):
        end_row = LogitsProcessorList([_EndRow(turn % 2, ids.shape[1] + 4, eos)])
        output = generate(
            subject,
            ids,
            cache,
            attention_mask=mask,
            logits_processor=end_row,
            eos_token_id=eos,
            pad_token_id=PAD_TOKEN_ID,
        )
        trace.add_generated(f"turn {turn}", output)
        answer = output.sequences[:, ids.shape[1] :]
        question, question_mask = left_padded([9, 13, 2], seed=turn + 1)
        mask = torch.cat([mask, (answer != PAD_TOKEN_ID).long(), question_mask], dim=1)
        ids = torch.cat([output.sequences, question], dim=1)
    return trace


@mode
def multi_turn(subject: Subject) -> Trace:
    """Three turns on one cache; between them the question brings more than one token to a filled cache."""
    trace, cache = Trace(), subject.new()
    ids = random_tokens(2, 42)
    for turn in range(3):
        output = generate(subject, ids, cache, new_tokens=12)
        trace.add_generated(f"turn {turn}", output)
        ids = torch.cat([output.sequences, random_tokens(2, 7 + turn, seed=turn + 1)], dim=1)
    return trace


@mode
def chunked_prefill(subject: Subject) -> Trace:
    """Chunks that are no multiple of a page, with padding that reaches into the second chunk."""
    ids, mask = left_padded([77, 58])
    trace = Trace()
    trace.add_generated(
        "chunks of 13", generate(subject, ids, subject.new(), attention_mask=mask, prefill_chunk_size=13)
    )
    return trace


@mode
def prompt_lookup(subject: Subject) -> Trace:
    phrase = random_tokens(1, 11)
    ids = torch.cat([phrase, random_tokens(1, 17, seed=1)] * 2 + [phrase[:, :5]], dim=1)
    trace = Trace()
    trace.add_generated("lookup", generate(subject, ids, subject.new(), new_tokens=20, prompt_lookup_num_tokens=4))
    return trace


@mode
def assisted(subject: Subject) -> Trace:
    output = generate(
        subject, random_tokens(1, 61), subject.new(), new_tokens=20, assistant_model=assistant_model(subject.family)
    )
    trace = Trace()
    trace.add_generated("assisted", output)
    return trace
