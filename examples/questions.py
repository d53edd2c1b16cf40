"""One document, many questions: the document is read once, each question by a fork that shares its pages.

    python examples/questions.py --questions 5
    python examples/questions.py --model Qwen/Qwen3-0.6B --file report.txt --questions 50

Prints how long the document took, and each question with its answer and time.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from models import default_model
from texts import play
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin_hf import SpinCache

QUESTIONS = (
    "Who is the thane of Cawdor?", "What do the three witches foretell?", "Who is killed in the castle?",
    "Who are Malcolm and Donalbain?", "Where do the witches meet?",
)  # fmt: skip


def main() -> None:
    """Read the document, then answer the questions one by one."""
    parser = argparse.ArgumentParser(description="many questions about one document")
    parser.add_argument("--model", help="hub id or folder of a causal language model (default: a small one)")
    parser.add_argument("--file", type=Path, help="the document (default: the opening of Macbeth)")
    parser.add_argument("--tokens", type=int, default=1500, help="tokens of the document that are read")
    parser.add_argument("--questions", type=int, default=len(QUESTIONS))
    parser.add_argument("--max-new-tokens", type=int, default=16)
    args = parser.parse_args()

    name = args.model or default_model()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="auto")
    text = play("macbeth") if args.file is None else args.file.read_text()
    document = tokenizer(text[: 8 * args.tokens], return_tensors="pt")["input_ids"][:, : args.tokens].to(model.device)

    began = time.perf_counter()
    cache = SpinCache(model)
    with torch.no_grad():
        model(document, past_key_values=cache, logits_to_keep=1)
    print(f"{document.shape[1]:,} tokens read in {time.perf_counter() - began:.2f} s")

    for number in range(args.questions):
        question = QUESTIONS[number % len(QUESTIONS)]
        began = time.perf_counter()
        new = tokenizer(f"\n\nQuestion: {question}\nAnswer:", return_tensors="pt", add_special_tokens=False)
        ids = torch.cat([document, new["input_ids"].to(model.device)], 1)
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache.fork(), max_new_tokens=args.max_new_tokens,
            do_sample=False,
        )  # fmt: skip
        answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip().splitlines()
        print(f"{time.perf_counter() - began:6.2f} s  {question} {answer[0] if answer else ''}")


if __name__ == "__main__":
    main()
