"""Are questions about a long text still answered when decoding reads a part of it? `python -m benchmarks.quality.retrieval`.

    --model SmolLM2-135M-Instruct (default), or a folder or hub id with its chat format     --tokens 3000     --kvpress
    --methods shadowkv quest oracle window     --shares 64 32 16 8     --examples 4     --tasks passkey "one of six" ...

Every example (see `tasks.py`) is prefilled once, densely; its answer is decoded greedily from that prefill, densely and for
every method and budget of 1/64 to 1/8 of the context, beside 4 sinks and 64 recent tokens: from a `SpinCache` made from the
prefill (`prefill.py`), or from the prefill itself by a mask inside attention (`oracle` and `window`, see `chosen_tokens.py`),
or by kvpress (`--kvpress`, see `kvpress_worker.py`). Those others get as many tokens as `shadowkv` attends to at the same
budget.

Finished examples are in the results file and are not run again, so a run that was stopped goes on; `--again` starts anew.
Writes `benchmarks/results/retrieval-<model>.json` and prints a table of mean scores. A score is the fraction of the expected
values that the answer contains.
"""

from __future__ import annotations

from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, Cache

from benchmarks.common.example_models import play
from benchmarks.quality import kvpress_rivals, run_options
from benchmarks.quality.chosen_tokens import RECENT, SINKS, Chosen, chooser
from benchmarks.quality.prefill import Prefill, load_model
from benchmarks.quality.quality_tables import task_table
from benchmarks.quality.tasks import TASKS, Example, example, prompt, question

NEW_TOKENS = 28
"""Three numbers of five digits, each a token, with commas; an answer ends at the end of its line."""
PLAYS = ("macbeth", "hamlet", "othello")
END = "<|im_end|>"
PRESSES = (*(press for press in kvpress_rivals.PRESSES if press != "streamingllm"), *kvpress_rivals.UNSEEN)
"""Without kvpress's StreamingLLM, which is `window`; `quality.py` has both."""


def ending(tokenizer: Any) -> list[int]:
    """The ids after which an answer is over: those with a line break, and the end of a turn."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return [token for token, text in enumerate(texts) if "\n" in text or text == END]


def one_line(tokenizer: Any, tokens: list[int]) -> str:
    """The text of an answer, without what ended it."""
    return str(tokenizer.decode(tokens)).split(END)[0].split("\n")[0]


@torch.no_grad()
def answer(model: Any, last: int, cache: Cache, stop: list[int]) -> list[int]:
    """The greedy answer from a cache that holds the prompt but its last token."""
    tokens = [last]
    while len(tokens) <= NEW_TOKENS and (len(tokens) == 1 or tokens[-1] not in stop):
        tokens.append(
            int(model(torch.tensor([tokens[-1:]], device=model.device), past_key_values=cache).logits[0, -1].argmax())
        )
    return tokens[1:]


class Asker:
    """Asks a model.

    Args:
        model, tokenizer: of a chat in SmolLM2's format.
        num_tokens: length of a prompt.
    """

    def __init__(self, model: Any, tokenizer: Any, num_tokens: int) -> None:
        self.model, self.tokenizer, self.num_tokens, self.stop = model, tokenizer, num_tokens, ending(tokenizer)

    def prompt(self, task: str, index: int) -> tuple[Example, list[int]]:
        """An example and its ids."""
        asked = example(task, index)
        return asked, prompt(self.tokenizer, asked, play(PLAYS[index % len(PLAYS)]), self.num_tokens, index)

    def entry(self, asked: Example, tokens: list[int], attended: float) -> dict[str, Any]:
        """What is kept of an answer."""
        text = one_line(self.tokenizer, tokens)
        return {"score": round(asked.score(text), 4), "answer": text, "attended_tokens": round(attended, 1)}

    def ask(self, task: str, index: int, cells: list[tuple[str, int]], held: dict[str, Any]) -> None:
        """Add to `held` the answers of one example that are missing: densely, and of every (method, share)."""
        missing = [cell for cell in cells if name_of(cell) not in held]
        if not missing and "dense" in held:
            return
        asked, ids = self.prompt(task, index)
        prefill = Prefill(self.model, ids[:-1])
        for method, share in missing:
            if method in ("oracle", "window"):
                attended = float(equal_tokens(held, share))
                with Chosen(self.model, chooser(method, int(attended))):
                    tokens = answer(self.model, ids[-1], prefill.dense(), self.stop)
            else:
                cache = prefill.sparse(
                    method, budget=len(ids) // share, num_sink_tokens=SINKS, recent_window=RECENT, summary_dtype="int8"
                )
                tokens = answer(self.model, ids[-1], cache, self.stop)
                attended = float(cache.stats().attended_tokens)
            held[name_of((method, share))] = self.entry(asked, tokens, attended)
        if "dense" not in held:
            held["dense"] = self.entry(asked, answer(self.model, ids[-1], prefill.dense(), self.stop), len(ids))

    def case(self, key: str, task: str, index: int, shares: list[int], held: dict[str, Any]) -> dict[str, Any]:
        """What kvpress is still to answer of one example."""
        asked, ids = self.prompt(task, index)
        kept = {
            (press, share): equal_tokens(held, share) for press in PRESSES for share in shares
            if kvpress_rivals.cell(press, share) not in held
        }  # fmt: skip
        context = len(ids) - len(question(self.tokenizer, asked))
        return kvpress_rivals.case(key, ids, context, kept, new_tokens=NEW_TOKENS, stop=self.stop)


def name_of(cell: tuple[str, int]) -> str:
    """The name of a method's row at a share."""
    return f"{cell[0]}, 1/{cell[1]}"


def equal_tokens(held: dict[str, Any], share: int) -> int:
    """How many tokens `shadowkv` attended to in this example."""
    return round(held[f"shadowkv, 1/{share}"]["attended_tokens"])


def main() -> None:
    """Ask what is missing, write JSON, print a table."""
    parser = run_options.parser(__doc__, ["shadowkv", "quest", "oracle", "window"], 3000)
    parser.add_argument("--examples", type=int, default=4, help="of each task")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    args = run_options.parse(parser)
    model = load_model(args.model, args.dtype, args.device)
    asker = Asker(model, AutoTokenizer.from_pretrained(args.model), args.tokens)
    rows = run_options.open_rows("retrieval", args, new_tokens=NEW_TOKENS)
    cells = [(method, share) for method in args.methods for share in args.shares]
    examples = {f"{task}, {index}": (task, index) for index in range(args.examples) for task in args.tasks}
    presses = [kvpress_rivals.cell(press, share) for press in PRESSES for share in args.shares if args.kvpress]
    with tqdm(total=len(examples) * (len(cells) + 1 + len(presses)), unit=" answers") as bar:
        for key, (task, index) in examples.items():
            held = rows.rows.get(key, {})
            before = len(held)
            asker.ask(task, index, cells, held)
            if len(held) > before:
                rows.put(key, held)
            bar.update(len(cells) + 1 + sum(cell in held for cell in presses))
        open_for = [key for key in examples if any(cell not in rows[key] for cell in presses)]
        cases = [asker.case(key, *examples[key], args.shares, rows[key]) for key in open_for]
        for key, cell, reply in kvpress_rivals.ask(args.model, cases):
            entry = asker.entry(example(*examples[key]), reply["tokens"], reply["attended_tokens"])
            rows.put(key, {**rows[key], cell: entry})
            bar.update()
    print("\n" + "\n".join(task_table(rows.rows)))


if __name__ == "__main__":
    main()
