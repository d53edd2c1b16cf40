"""Does a small real model still find one sentence in a long text when it attends to a part of it?

    python -m benchmarks.quality.passkey     2,048 tokens, 6 depths, budgets 64 to 512
    make bench

A passkey is hidden at a given depth of Shakespeare's plays and asked for in a chat. Every depth is prefilled once,
densely; then each budget decodes the answer from a `SpinCache` built from that prefill, so that rows differ in nothing but what
decoding attends to. Writes `benchmarks/results/passkey.json` and prints the table.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache

from benchmarks.common.example_models import default_model, play
from benchmarks.common.record import RESULTS
from spin_hf import SpinCache, __version__

PASSKEYS = ["70817", "42396", "15928", "83604", "29571", "56143"]
QUESTION = "What is the secret passkey of the theatre's back door?"
ANSWER = "<|im_start|>assistant\nThe secret passkey of the theatre's back door is"
NEW_TOKENS = 10


def build_prompt(tokenizer: Any, num_tokens: int, depth: float, passkey: str) -> torch.Tensor:
    """Ids [1, num_tokens] of a chat whose text holds the passkey at `depth` in [0, 1], up to the answer's first words."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    head = ids("<|im_start|>user\nHere is a text.\n\n")
    needle = ids(f"\n\nThe secret passkey of the theatre's back door is {passkey}.\n\n")
    tail = ids(f"\n\nAnswer in one short sentence, from the text: {QUESTION}<|im_end|>\n{ANSWER}")
    text = ids(play("macbeth"))[: num_tokens - len(head) - len(needle) - len(tail)]
    cut = round(depth * len(text))
    return torch.tensor([head + text[:cut] + needle + text[cut:] + tail])


@torch.no_grad()
def answer(model: Any, tokenizer: Any, last: int, cache: Cache, new_tokens: int = NEW_TOKENS) -> str:
    """The greedy answer, token by token, from a cache that holds the prompt but its last token."""
    tokens = [last]
    for _ in range(new_tokens):
        tokens.append(int(model(torch.tensor([tokens[-1:]]), past_key_values=cache).logits[0, -1].argmax()))
    return tokenizer.decode(tokens[1:])


def table(result: dict[str, Any]) -> list[str]:
    """Tokens attended to and passkeys found, by budget."""
    tokens = result["tokens"]
    lines = [f"| {tokens:,} tokens | attended per KV head and step | passkeys found |", "| --- | --- | --- |"]
    for row, entry in result["rows"].items():
        share = min(entry["attended_tokens"] / tokens, 1)
        found = f"{entry['found']} of {entry['asked']}"
        lines.append(f"| {row} | {entry['attended_tokens']:,.0f} ({share:.0%}) | {found} |")
    return lines


def main() -> None:
    """Run all depths and budgets, write JSON, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="folder or hub id; needs SmolLM2's chat format (default: SmolLM2-135M-Instruct)"
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--depths", type=int, default=6)
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--output", type=Path, default=RESULTS / "passkey.json")
    args = parser.parse_args()

    name = args.model or default_model()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).eval()
    rows: dict[str, dict[str, Any]] = {}
    with tqdm(total=args.depths * (len(args.budgets) + 1), unit=" answers") as bar:
        for index in range(args.depths):
            depth, passkey = index / max(1, args.depths - 1), PASSKEYS[index % len(PASSKEYS)]
            prompt = build_prompt(tokenizer, args.tokens, depth, passkey)
            prefilled = DynamicCache(config=model.config)
            with torch.no_grad():
                model(prompt[:, :-1], past_key_values=prefilled, logits_to_keep=1)
            caches: dict[str, Cache] = {
                f"budget {budget}": SpinCache.from_cache(prefilled, model, "shadowkv", budget=budget, dense_below=0)
                for budget in args.budgets
            }
            for row, cache in {**caches, "dense": prefilled}.items():  # dense last: answering fills the shared prefill
                text = answer(model, tokenizer, int(prompt[0, -1]), cache)
                entry = rows.setdefault(row, {"found": 0, "asked": 0, "attended_tokens": [], "answers": []})
                entry["found"] += passkey in text
                entry["asked"] += 1
                attended = cache.stats().attended_tokens if isinstance(cache, SpinCache) else cache.get_seq_length()
                entry["attended_tokens"].append(round(float(attended), 1))
                entry["answers"].append({"depth": depth, "passkey": passkey, "answer": text})
                bar.update()
    for entry in rows.values():
        entry["attended_tokens"] = round(sum(entry["attended_tokens"]) / entry["asked"], 1)
    versions = {"spin_hf": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    about = {
        "model": Path(name).name, "tokens": args.tokens, "dtype": "bfloat16", "device": "cpu",
        "machine": platform.machine(),
        "method": "shadowkv", "num_sink_tokens": 4, "recent_window": 64, "versions": versions,
    }  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    print("\n" + "\n".join(table({**about, "rows": rows})))


if __name__ == "__main__":
    main()
