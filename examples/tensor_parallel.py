"""A model on several GPUs, one process for each: every process has the pages of its heads.

torchrun --nproc-per-node 2 examples/tensor_parallel.py --model meta-llama/Llama-3.1-8B-Instruct

Without a GPU the processes run on the CPU. The small default model has three KV heads: use --nproc-per-node 3.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("NCCL_GRAPH_MIXING_SUPPORT", "0")  # before the process group is made

import torch.distributed as dist
from models import default_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

from spin_hf import SpinCache


def main() -> None:
    """Answer one prompt on all ranks; the first one prints."""
    parser = argparse.ArgumentParser(description="generate() with a SpinCache on several GPUs")
    parser.add_argument("--model", help="hub id or folder of a causal language model (default: a small one)")
    parser.add_argument("--prompt", default="Gravity is the force that", help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    args = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        parser.error("expected torchrun to start this script; see the lines at the top of it")

    name = args.model or default_model()
    tokenizer = AutoTokenizer.from_pretrained(name)
    config = DistributedConfig(tp_size=int(os.environ["WORLD_SIZE"]))
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", distributed_config=config)

    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    cache = SpinCache(model)
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=args.max_new_tokens, do_sample=False)

    stats = cache.stats(all_ranks=True)
    if dist.get_rank() == 0:
        print(tokenizer.decode(output[0], skip_special_tokens=True))
        print()
        print(stats)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
