"""A model on several GPUs: where its layers are, what a SpinCache takes on each, and an answer.

python examples/device_map.py --model Qwen/Qwen3-32B --max-memory 40GiB 40GiB --context-length 131072
"""

from __future__ import annotations

import argparse
import logging
from collections import Counter

import torch
from models import default_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import spin_hf
from spin_hf import SpinCache


def main() -> None:
    """Place a model, print the plan, and answer one prompt."""
    parser = argparse.ArgumentParser(description="generate() with a SpinCache over several GPUs")
    parser.add_argument("--model", help="hub id or folder of a causal language model (default: a small one)")
    parser.add_argument("--prompt", default="Gravity is the force that", help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--max-memory", nargs="+", metavar="SIZE", help="memory for weights on each GPU, such as 40GiB")
    parser.add_argument("--context-length", type=int, default=32768, help="tokens that the plan counts")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")  # a step that is not captured says why

    gpus = torch.cuda.device_count()
    if args.max_memory and len(args.max_memory) != gpus:
        parser.error(f"--max-memory: expected a size for each of {gpus} GPUs, got {len(args.max_memory)}")
    name = args.model or default_model()
    limits = dict(enumerate(args.max_memory)) if args.max_memory else None
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="auto", max_memory=limits)

    places = Counter(str(device) for device in getattr(model, "hf_device_map", {"": model.device}).values())
    print("modules by device:", ", ".join(f"{device}: {count}" for device, count in places.items()))
    print(spin_hf.plan(model, context_length=args.context_length))

    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    cache = SpinCache(model)
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=args.max_new_tokens, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))
    print(cache.stats())


if __name__ == "__main__":
    main()
