"""Are questions about a long text still answered when decoding reads a part of it? `python benchmarks/retrieval.py`.

    --model SmolLM2-135M-Instruct (default), or a folder or hub id with its chat format        --tokens 3000
    --methods shadowkv quest window        --shares 64 32 16 8        --examples 6        --tasks passkey "one of six" ...

Every example (see `tasks.py`) is prefilled once, densely; its answer is decoded greedily from that prefill, densely and from a
`SpinCache` for every method and budget of 1/64 to 1/8 of the context, beside 4 sinks and 64 recent tokens. `window` chooses
nothing: its budget goes to more recent tokens, as in StreamingLLM (arXiv 2309.17453).

Finished examples are kept in the results file and not asked again, so a run that was stopped goes on; `--again` starts anew.
Writes `benchmarks/results/retrieval-<model>.json` and prints a table: the share of what was asked for that was answered.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from passkey import answer
from record import RESULTS, fingerprint
from tasks import TASKS, Example, example, prompt
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache

from spin_hf import SpinCache, __version__

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from models import default_model
from texts import play

SINKS, RECENT, NEW_TOKENS = 4, 64, 16
PLAYS = ("macbeth", "hamlet", "othello")
PAGE = 8


def sparse(prefilled: DynamicCache, model: Any, method: str, budget: int) -> SpinCache:
    """A SpinCache of what is prefilled, that attends to `budget` tokens beside sinks and window."""
    recent = RECENT
    if method == "window":
        method, budget, recent = "shadowkv", PAGE, RECENT + budget - PAGE  # a choice there must be: one page
    return SpinCache.from_cache(
        prefilled, model, method, budget=budget, num_sink_tokens=SINKS, recent_window=recent
    )  # fmt: skip


def one_line(model: Any, tokenizer: Any, last: int, cache: Cache) -> str:
    """The greedy answer from a cache that holds the prompt but its last token, as far as it is one line."""
    text = answer(model, tokenizer, last, cache, NEW_TOKENS)
    return text.split("<|im_end|>")[0].split("\n")[0]


def ask(model: Any, tokenizer: Any, asked: Example, ids: list[int], cells: list[tuple[str, int]]) -> dict[str, Any]:
    """Answers and scores of one example: dense, and every (method, share)."""
    prefilled = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([ids[:-1]]), past_key_values=prefilled, logits_to_keep=1)
    found = {}
    for method, share in cells:
        cache = sparse(prefilled, model, method, len(ids) // share)
        text = one_line(model, tokenizer, ids[-1], cache)
        attended = round(float(cache.stats().attended_tokens), 1)
        found[f"{method}, 1/{share}"] = {"score": asked.score(text), "answer": text, "attended_tokens": attended}
    text = one_line(model, tokenizer, ids[-1], prefilled)  # last: answering fills the prefill
    found["dense"] = {"score": asked.score(text), "answer": text, "attended_tokens": len(ids)}
    return found


def table(rows: dict[str, Any], tasks: list[str], cells: list[tuple[str, int]]) -> list[str]:
    """Scores by method and budget, of each task and of all."""
    lines = ["| | " + " | ".join(tasks) + " | mean |", "|---" * (len(tasks) + 2) + "|"]
    for name in ["dense", *(f"{method}, 1/{share}" for method, share in cells)]:
        means = []
        for task in tasks:
            scores = [row[name]["score"] for key, row in rows.items() if key.startswith(f"{task}, ") and name in row]
            means.append(sum(scores) / len(scores) if scores else float("nan"))
        lines.append(f"| {name} | " + " | ".join(f"{mean:.0%}" for mean in [*means, sum(means) / len(means)]) + " |")
    return lines


def main() -> None:
    """Ask what is missing, write JSON, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--methods", nargs="+", default=["shadowkv", "quest", "window"])
    parser.add_argument(
        "--shares", type=int, nargs="+", default=[64, 32, 16, 8], help="budgets: 1/share of the context"
    )
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--examples", type=int, default=6, help="of each task")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--again", action="store_true", help="ask finished examples again")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    name = args.model or default_model()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).eval()
    output = args.output or RESULTS / f"retrieval-{Path(name).name}.json"
    about = {
        "model": Path(name).name, "tokens": args.tokens, "new_tokens": NEW_TOKENS, "dtype": "bfloat16", "device": "cpu",
        "machine": platform.machine(), "num_sink_tokens": SINKS, "recent_window": RECENT, "sources": fingerprint(),
        "versions": {"spin_hf": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }  # fmt: skip
    before = json.loads(output.read_text()) if output.exists() and not args.again else {}
    rows: dict[str, Any] = before["rows"] if {key: before.get(key) for key in about} == about else {}
    cells = [(method, share) for method in args.methods for share in args.shares]
    for key, (task, index) in tqdm(
        {f"{task}, {i}": (task, i) for i in range(args.examples) for task in args.tasks}.items(), unit=" examples"
    ):
        held = rows.setdefault(key, {})
        missing = [cell for cell in cells if f"{cell[0]}, 1/{cell[1]}" not in held]
        if missing or "dense" not in held:
            asked = example(task, index)
            ids = prompt(tokenizer, asked, play(PLAYS[index % len(PLAYS)]), args.tokens, index)
            held |= ask(model, tokenizer, asked, ids, missing)
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    print("\n" + "\n".join(table(rows, args.tasks, cells)))


if __name__ == "__main__":
    main()
