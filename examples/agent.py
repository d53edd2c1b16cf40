"""An agent whose history grows: every turn sends all of it again, and a PromptStore restores what was read before.

    python examples/agent.py --turns 6

Prints each turn's prompt length, what was restored, and the time to the answer; then the same without a store.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from models import default_model
from texts import play
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin_hf import PromptStore, enable

RESULT_TOKENS = 300
"""Tokens that each turn's tool brings: lines of Macbeth."""


def turns(model: Any, tokenizer: Any, number: int, new_tokens: int, store: PromptStore | None) -> float:
    """Run the agent. Returns the seconds of all turns."""
    lines = tokenizer(play("macbeth")[: 8 * RESULT_TOKENS * (number + 1)], return_tensors="pt")["input_ids"].to(
        model.device
    )
    history, total = lines[:, :RESULT_TOKENS], 0.0
    with enable(model, store=store):
        for turn in range(number):
            reused = 0 if store is None else store.stats().reused_tokens
            began = time.perf_counter()
            output = model.generate(
                history, attention_mask=torch.ones_like(history), max_new_tokens=new_tokens, do_sample=False
            )
            took = time.perf_counter() - began
            total += took
            restored = 0 if store is None else store.stats().reused_tokens - reused
            print(f"turn {turn + 1:2}: {history.shape[1]:6,} tokens, {restored:6,} restored, {took:6.2f} s")
            result = lines[:, RESULT_TOKENS * (turn + 1) : RESULT_TOKENS * (turn + 2)]
            history = torch.cat([output, result], 1)
    return total


def main() -> None:
    """Run the agent with and without a store."""
    parser = argparse.ArgumentParser(description="an agent loop with a PromptStore")
    parser.add_argument("--model", help="hub id or folder of a causal language model (default: a small one)")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--max-new-tokens", type=int, default=8)
    args = parser.parse_args()

    name = args.model or default_model()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="auto")
    with_store = turns(model, tokenizer, args.turns, args.max_new_tokens, PromptStore())
    print("without a store:")
    without = turns(model, tokenizer, args.turns, args.max_new_tokens, None)
    print(f"{with_store:.1f} s with a store, {without:.1f} s without")


if __name__ == "__main__":
    main()
