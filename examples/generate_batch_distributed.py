"""Many prompts on the GPUs of one machine: each process has a model and a loop of its own, prompts are dealt out.

    accelerate launch --num_processes 8 examples/generate_batch_distributed.py --prompts prompts.txt --output answers.jsonl
    python -m torch.distributed.run --nproc_per_node 8 examples/generate_batch_distributed.py

Writes a JSON object per prompt, in their order. Without a GPU it runs on the CPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from models import default_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import spin_hf

PROMPTS = ["The three primary colours are", "Water boils at", "The capital of France is", "A triangle has"]


def main() -> None:
    """Generate in every process; the first one writes the answers of all."""
    parser = argparse.ArgumentParser(description="many prompts, several GPUs")
    parser.add_argument("--model", help="hub id or folder of a causal language model (default: a small one)")
    parser.add_argument("--prompts", type=Path, help="a file with a prompt per line (default: four of them)")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("answers.jsonl"))
    args = parser.parse_args()

    state = PartialState(cpu=not torch.cuda.is_available())
    with state.main_process_first():  # which may have to fetch the default model
        name = args.model or default_model()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(state.device)
    prompts = PROMPTS if args.prompts is None else args.prompts.read_text().splitlines()

    with state.split_between_processes(list(enumerate(prompts))) as mine:
        results = spin_hf.generate_batch(
            model, [prompt for _, prompt in mine], tokenizer=tokenizer, max_new_tokens=args.max_new_tokens,
            do_sample=False, progress=state.is_main_process,
        )  # fmt: skip
    answers = [
        {"prompt": prompt, "answer": result.text, "finish_reason": result.finish_reason, "index": index}
        for (index, prompt), result in zip(mine, results, strict=True)
    ]
    gathered = gather_object(answers)
    if state.is_main_process:
        lines = [json.dumps(answer) for answer in sorted(gathered, key=lambda answer: answer["index"])]
        args.output.write_text("\n".join(lines) + "\n")
        print(f"{len(lines)} answers of {state.num_processes} processes: {args.output}")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
