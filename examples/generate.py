"""The three lines: a model, its inputs, and a SpinCache handed to `generate`.

python examples/generate.py --model Qwen/Qwen3-0.6B --prompt "Why is the sky blue?"
"""

from __future__ import annotations

import argparse

from models import default_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin_hf import SpinCache


def main() -> None:
    """Answer one prompt."""
    parser = argparse.ArgumentParser(description="generate() with a SpinCache")
    parser.add_argument("--model", help="hub id or folder of a causal language model (default: a small one)")
    parser.add_argument("--prompt", default="Gravity is the force that", help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    args = parser.parse_args()

    name = args.model or default_model()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="auto")

    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    cache = SpinCache(model)
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=args.max_new_tokens, do_sample=False)

    print(tokenizer.decode(output[0], skip_special_tokens=True))
    print()
    print(cache.stats())


if __name__ == "__main__":
    main()
