"""Greedy answers to questions about one prompt: densely, by every method and budget, and by kvpress.

    Question        a prompt, how its answer ends, and what the answer is worth
    answer_all      every question's missing answers, into the rows of a results file

Every prompt is prefilled once, densely. Its answer is decoded greedily from that prefill, densely and for every method and
budget, beside 4 sinks and 64 recent tokens: from a `SpinCache` made from the prefill (`prefill.py`), or from the prefill itself
by a mask inside attention (`oracle` and `window`, see `chosen_tokens.py`), or by kvpress (see `kvpress_worker.py`). Those
others get as many tokens as `shadowkv` attends to at the same budget. No context is so short that all of it is attended to.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import Cache

from benchmarks.common.rows_file import Rows
from benchmarks.quality import kvpress_rivals
from benchmarks.quality.chosen_tokens import RECENT, SINKS, Chosen, chooser
from benchmarks.quality.prefill import Prefill

PRESSES = tuple(press for press in kvpress_rivals.PRESSES if press != "streamingllm")
"""Without kvpress's StreamingLLM, which is `window`; `quality.py` has both."""
_MARK = "(the text)"


@dataclass(frozen=True)
class Question:
    """A prompt, and its answer.

    Attributes:
        ids: the prompt.
        context: how many of them stand before the question; all, where that is not known.
        new_tokens: the answer's largest number of tokens.
        stop: ids that end an answer.
        text: from an answer's ids to its text.
        score: from an answer's text to a score in [0, 1].
        length: budgets are shares of so many tokens; 0 for those of `ids`. One length for all prompts of a kind lets caches
            use each other's CUDA graphs.
    """

    ids: list[int]
    context: int
    new_tokens: int
    stop: list[int]
    text: Callable[[list[int]], str]
    score: Callable[[str], float]
    length: int = 0

    def entry(self, tokens: list[int], attended: float) -> dict[str, Any]:
        """What is recorded of an answer."""
        text = self.text(tokens)
        return {"score": round(self.score(text), 4), "answer": text, "attended_tokens": round(attended, 1)}


def turns(tokenizer: Any) -> tuple[str, str]:
    """What a chat writes before and behind the user's text, up to the model's answer; both empty without a chat format."""
    if not tokenizer.chat_template:
        return "", ""
    chat = [{"role": "user", "content": _MARK}]
    whole = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    head, _, turn = whole.partition(_MARK)
    return head, turn


def end_of_turn(model: Any, tokenizer: Any) -> list[int]:
    """The ids after which the model says no more."""
    ids = model.generation_config.eos_token_id
    given = set(ids if isinstance(ids, list) else [ids]) | {tokenizer.eos_token_id}
    return sorted(token for token in given if token is not None)


@torch.no_grad()
def answer(model: Any, last: int, cache: Cache, stop: list[int], new_tokens: int) -> list[int]:
    """The greedy answer from a cache that holds the prompt but its last token."""
    tokens = [last]
    while len(tokens) <= new_tokens and (len(tokens) == 1 or tokens[-1] not in stop):
        tokens.append(
            int(model(torch.tensor([tokens[-1:]], device=model.device), past_key_values=cache).logits[0, -1].argmax())
        )
    return tokens[1:]


def name_of(cell: tuple[str, int]) -> str:
    """The name of a method's row at a share."""
    return f"{cell[0]}, 1/{cell[1]}"


def equal_tokens(held: dict[str, Any], share: int) -> int:
    """How many tokens `shadowkv` attended to in this example."""
    return round(held[f"shadowkv, 1/{share}"]["attended_tokens"])


def by_method(
    model: Any, question: Question, prefill: Prefill, cell: tuple[str, int], held: dict[str, Any]
) -> dict[str, Any]:
    """The entry of a method and share; `held` has that of `shadowkv` for `oracle` and `window`."""
    method, share = cell
    ids, rest = question.ids, (question.stop, question.new_tokens)
    if method in ("oracle", "window"):
        attended = float(equal_tokens(held, share))
        with Chosen(model, chooser(method, int(attended))):
            return question.entry(answer(model, ids[-1], prefill.dense(), *rest), attended)
    cache = prefill.sparse(
        method, budget=(question.length or len(ids)) // share, num_sink_tokens=SINKS, recent_window=RECENT,
        summary_dtype="int8", dense_below=0,
    )  # fmt: skip
    tokens = answer(model, ids[-1], cache, *rest)
    return question.entry(tokens, float(cache.stats().attended_tokens))


def ask(
    model: Any, question: Callable[[], Question], cells: list[tuple[str, int]], held: dict[str, Any]
) -> Iterator[None]:
    """Add to `held` the answers that are missing, of every (method, share) and the dense one; yields after each."""
    missing = [cell for cell in cells if name_of(cell) not in held]
    if not missing and "dense" in held:
        return
    made = question()
    prefill = Prefill(model, made.ids[:-1])
    for cell in missing:
        held[name_of(cell)] = by_method(model, made, prefill, cell, held)
        yield
    if "dense" not in held:
        tokens = answer(model, made.ids[-1], prefill.dense(), made.stop, made.new_tokens)
        held["dense"] = made.entry(tokens, len(made.ids))
        yield


def case(
    key: str, question: Question, presses: Sequence[str], shares: list[int], held: dict[str, Any]
) -> dict[str, Any]:
    """What kvpress is still to answer of one question."""
    kept = {
        (press, share): equal_tokens(held, share) for press in presses for share in shares
        if kvpress_rivals.cell(press, share) not in held
    }  # fmt: skip
    task = {"new_tokens": question.new_tokens, "stop": question.stop}
    return kvpress_rivals.case(key, question.ids, question.context, kept, **task)


def answer_all(
    model: Any, questions: dict[str, Callable[[], Question]], args: argparse.Namespace, rows: Rows,
    presses: Sequence[str] = PRESSES,
) -> None:  # fmt: skip
    """Ask what is missing in `rows`, which are written after every answer.

    Args:
        questions: by the names of their rows; each is made when it is asked.
        args: as `run_options.parse` gives.
        presses: of kvpress, if `args.kvpress`.
    """
    cells = [(method, share) for method in args.methods for share in args.shares]
    of_presses = [kvpress_rivals.cell(press, share) for press in presses for share in args.shares if args.kvpress]
    with tqdm(total=len(questions) * (len(cells) + 1 + len(of_presses)), unit=" answers") as bar:
        for key, question in questions.items():
            held = dict(rows.rows.get(key, {}))
            bar.update(sum(cell in held for cell in ("dense", *map(name_of, cells), *of_presses)))
            for _ in ask(model, question, cells, held):
                rows.put(key, held)
                bar.update()
        open_for = {key: questions[key]() for key in questions if any(cell not in rows[key] for cell in of_presses)}
        cases = [case(key, made, presses, args.shares, rows[key]) for key, made in open_for.items()]
        for key, cell, reply in kvpress_rivals.ask(args.model, cases):
            rows.put(key, {**rows[key], cell: open_for[key].entry(reply["tokens"], reply["attended_tokens"])})
            bar.update()
