"""Many prompts on a cluster: Ray Data moves the data and starts the processes, each with a loop of its own.

    pip install "ray[data]"
    python examples/ray_data.py --prompts prompts.jsonl --output answers --gpus 8

`Generate` needs no Ray: it is a class that maps a batch of columns to another one.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from models import default_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import spin_hf

PROMPTS = ["The three primary colours are", "Water boils at", "The capital of France is", "A triangle has"]


class Generate:
    """Answers the column `prompt` of a batch. Ray makes one object in each process.

    Args:
        model: hub id or folder.
        device: of the model; None for the GPU if there is one.
        options: as for `spin_hf.generate_batch`.
    """

    def __init__(self, model: str, device: str | None = None, **options: Any) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype="auto", device_map=device or "auto")
        self.options = options

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch, with the columns `answer` and `finish_reason`."""
        results = spin_hf.generate_batch(
            self.model,
            [str(prompt) for prompt in batch["prompt"]],
            tokenizer=self.tokenizer,
            progress=False,
            **self.options,
        )
        return {
            **batch, "answer": np.array([result.text for result in results]),
            "finish_reason": np.array([result.finish_reason for result in results]),
        }  # fmt: skip


def main() -> None:
    """Map the prompts and write the answers as JSON lines."""
    import ray  # only for the cluster

    parser = argparse.ArgumentParser(description="many prompts on a cluster")
    parser.add_argument("--model", help="hub id or folder of a causal language model (default: a small one)")
    parser.add_argument("--prompts", help="JSON lines with a field `prompt` (default: four of them)")
    parser.add_argument("--output", help="folder of JSON lines (default: the answers are printed)")
    parser.add_argument("--gpus", type=int, default=0, help="processes, each with a GPU; 0 for one on the CPU")
    parser.add_argument("--batch-size", type=int, default=256, help="prompts that one call of the loop gets")
    args = parser.parse_args()

    prompts = (
        ray.data.read_json(args.prompts)
        if args.prompts
        else ray.data.from_items([{"prompt": prompt} for prompt in PROMPTS])
    )
    answers = prompts.map_batches(
        Generate, fn_constructor_kwargs={"model": args.model or default_model(), "max_new_tokens": 16, "do_sample": False},
        batch_size=args.batch_size, concurrency=max(1, args.gpus), num_gpus=1 if args.gpus else 0,
    )  # fmt: skip
    if args.output:
        answers.write_json(args.output)
    else:
        for row in answers.take_all():
            print(f"{row['prompt']} {row['answer']}")


if __name__ == "__main__":
    main()
