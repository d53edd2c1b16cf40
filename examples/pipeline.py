"""`enable(model)` and an unchanged text-generation pipeline: one prompt, a batch of prompts, a chat.

python examples/pipeline.py --model Qwen/Qwen3-0.6B
"""

from __future__ import annotations

import argparse

from models import default_model
from transformers import pipeline

from spin_hf import enable


def main() -> None:
    """Run the three kinds of input that a text-generation pipeline takes."""
    parser = argparse.ArgumentParser(description='pipeline("text-generation") with a SpinCache in every call')
    parser.add_argument("--model", help="hub id or folder of a causal language model (default: a small one)")
    parser.add_argument("--budget", type=int, default=2048, help="tokens attended per KV head and step")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    args = parser.parse_args()

    pipe = pipeline("text-generation", model=args.model or default_model(), dtype="auto", device_map="auto")
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": False, "return_full_text": False}
    if pipe.tokenizer.pad_token_id is None:  # a batch needs padding
        pipe.tokenizer.pad_token_id = pipe.tokenizer.eos_token_id
    pipe.tokenizer.padding_side = "left"

    with enable(pipe.model, budget=args.budget):
        prompt = "Water boils at"
        print("single:", prompt, "->", pipe(prompt, **options)[0]["generated_text"])

        prompts = ["The capital of France is", "A haiku has three lines. The first of them", "Two and two"]
        for prompt, answer in zip(prompts, pipe(prompts, batch_size=2, **options), strict=True):
            print("batch: ", prompt, "->", answer[0]["generated_text"])

        if pipe.tokenizer.chat_template:
            chat = [{"role": "user", "content": "Name a colour."}]
            print("chat:  ", chat[0]["content"], "->", pipe(chat, **options)[0]["generated_text"])


if __name__ == "__main__":
    main()
