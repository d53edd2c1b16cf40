"""A chat over a book, with a restart in between: the second run goes on without reading the book.

    python examples/restart.py --folder book      reads the opening of Macbeth, answers, saves the cache
    python examples/restart.py --folder book      loads it and answers the next question

Prints what took how long. Delete the folder to begin anew.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from models import default_model
from texts import play
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin_hf import SavedCacheError, SpinCache

QUESTIONS = ("Who is the thane of Cawdor?", "What do the three witches foretell?", "Where do the witches meet?")


def main() -> None:
    """Read or restore the book, then answer one question."""
    parser = argparse.ArgumentParser(description="a chat that survives a restart")
    parser.add_argument("--folder", type=Path, default=Path("book"), help="where the cache is saved")
    parser.add_argument("--model", help="hub id or folder of a causal language model (default: a small one)")
    parser.add_argument("--file", type=Path, help="the book (default: the opening of Macbeth)")
    parser.add_argument("--tokens", type=int, default=1500, help="tokens of the book that are read")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    args = parser.parse_args()

    name = args.model or default_model()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="auto")

    began = time.perf_counter()
    history, asked = args.folder / "history.json", 0
    try:
        cache = SpinCache.from_pretrained(args.folder / "cache", model)
        held = json.loads(history.read_text())
        ids, asked = torch.tensor([held["ids"]], device=model.device), held["asked"]
        print(f"{cache.get_seq_length():,} tokens restored in {time.perf_counter() - began:.2f} s")
    except (SavedCacheError, FileNotFoundError):
        text = play("macbeth") if args.file is None else args.file.read_text()
        ids = tokenizer(text[: 8 * args.tokens], return_tensors="pt")["input_ids"][:, : args.tokens].to(model.device)
        cache = SpinCache(model)
        with torch.no_grad():
            model(ids, past_key_values=cache, logits_to_keep=1)
        print(f"{ids.shape[1]:,} tokens read in {time.perf_counter() - began:.2f} s")

    question = QUESTIONS[asked % len(QUESTIONS)]
    began = time.perf_counter()
    new = tokenizer(f"\n\nQuestion: {question}\nAnswer:", return_tensors="pt", add_special_tokens=False)
    prompt = torch.cat([ids, new["input_ids"].to(model.device)], 1)
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, max_new_tokens=args.max_new_tokens,
        do_sample=False,
    )  # fmt: skip
    answer = tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).strip().splitlines()
    print(f"{time.perf_counter() - began:6.2f} s  {question} {answer[0] if answer else ''}")

    began = time.perf_counter()
    cache.save_pretrained(args.folder / "cache")
    history.write_text(json.dumps({"ids": output[0].tolist(), "asked": asked + 1}))
    print(f"saved in {time.perf_counter() - began:.2f} s; run it again to go on")


if __name__ == "__main__":
    main()
