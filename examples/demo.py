"""A question about a long text, answered through SpinCache and through dense attention.

    make demo
    python examples/demo.py --model Qwen/Qwen3-0.6B --prompt-file report.txt --question "Who wrote the report?"

The text is read once, into a DynamicCache. `SpinCache.from_cache` copies it before the question is read. Each cache then
reads the question and answers, so both start from the same keys and values.

Without `--prompt-file` the text is the opening of Shakespeare's Macbeth with one sentence hidden in its middle, which
Shakespeare did not write. The question asks for it, so a right answer can only come from the text.

On a CPU the text has 2,500 tokens: two cores need less than 90 seconds. On a GPU it has 3,500.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import textwrap
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models import default_model
from texts import play
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache, TextStreamer

from spin_hf import SpinCache

HIDDEN_SENTENCE = "The secret passkey of the theatre's back door is 74213."
HIDDEN_QUESTION = "What is the secret passkey of the theatre's back door?"
TEXT_TOKENS = {"cpu": 2500, "cuda": 3500}
"""Tokens of Macbeth, by type of device."""
QUESTION_TOKENS = 64
"""Tokens at the prompt's end that each cache reads by itself. `fitted` learns from their queries which keys matter."""


@dataclass
class Answer:
    """The answer through one cache, and its times."""

    text: str
    times: list[float]
    """Seconds from the start of `generate` to each token."""

    @property
    def start_s(self) -> float:
        """Seconds to the second token: the question is read, tokens are clustered, on a GPU kernels are compiled."""
        return self.times[:2][-1]

    @property
    def ms_per_token(self) -> float:
        """Mean time of the decode steps after that, in milliseconds."""
        return 1000 * (self.times[-1] - self.start_s) / max(1, len(self.times) - 2)


class TimedStreamer(TextStreamer):
    """Prints the answer and records when each token arrives."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.start, self.times = time.perf_counter(), list[float]()

    def put(self, value: torch.Tensor) -> None:
        """Record the time of a token. The first call brings the prompt."""
        self.times.append(time.perf_counter() - self.start)
        super().put(value)


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""

    def budget(text: str) -> int | float:
        return float(text) if "." in text else int(text)

    parser = argparse.ArgumentParser(description="Ask a question about a long text, through SpinCache and densely.")
    parser.add_argument("--model", help="hub id or folder of any causal LM (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--prompt-file", type=Path, help="a text file to ask about (default: Macbeth, see above)")
    parser.add_argument("--question", help="asked after the text; without it the prompt file is the whole prompt")
    parser.add_argument("--method", default="fitted", help="how the tokens to attend to are chosen")
    parser.add_argument(
        "--budget",
        type=budget,
        default=256,
        help="tokens attended per KV head and step: 256, or a fraction such as 0.1",
    )
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=256, help="tokens of one prefill step, 64 or more")
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="default: the fastest one on the device"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    for option, least in (("max_new_tokens", 1), ("chunk", 64)):
        if getattr(args, option) < least:
            parser.error(f"--{option.replace('_', '-')}: expected at least {least}, got {getattr(args, option)}")
    if args.prompt_file is not None:
        if not args.prompt_file.is_file():
            parser.error(f"--prompt-file: there is no file {args.prompt_file}")
        try:
            args.text = args.prompt_file.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError as error:
            parser.error(f"--prompt-file: {args.prompt_file} is not UTF-8 text ({error.reason}, byte {error.start})")
        if not args.text:
            parser.error(f"--prompt-file: {args.prompt_file} is empty")
    return args


def hide_in_macbeth(tokenizer: Any, num_tokens: int) -> str:
    """The first `num_tokens` tokens of Macbeth with `HIDDEN_SENTENCE` between two speeches near the middle."""
    text = play("macbeth")
    ids = tokenizer(text, add_special_tokens=False).input_ids[:num_tokens]
    speeches = tokenizer.decode(ids).split("\n\n")
    speeches.insert(len(speeches) // 2, HIDDEN_SENTENCE)
    return "\n\n".join(speeches)


def build_inputs(tokenizer: Any, text: str, question: str | None) -> dict[str, torch.Tensor]:
    """Token ids [1, T] and attention mask [1, T] of the prompt, as a chat turn if the model has a chat template."""
    if tokenizer.chat_template:
        content = text
        if question:
            content = f"Here is a text.\n\n{text}\n\nAnswer in one short sentence, from the text: {question}"
        chat = [{"role": "user", "content": content}]
        encoded = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        content = f"{text}\n\nQuestion: {question}\nAnswer:" if question else text
        encoded = tokenizer(content, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def fastest_dtype(device: str) -> str | torch.dtype:
    """The model's own dtype on a GPU; on a CPU bfloat16 if it multiplies bfloat16 in hardware, else float32.

    Without such instructions every product converts bfloat16 to float32 first.
    """
    if torch.device(device).type != "cpu":
        return "auto"
    features: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # newer torch only
    return torch.bfloat16 if features.get("avx512_bf16") or features.get("amx_bf16") else torch.float32


def cache_argument(model: Any) -> str:
    """The name under which `model` takes a cache: "cache" from transformers 5.24 on."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def read_text(model: Any, inputs: dict[str, torch.Tensor], chunk: int) -> DynamicCache:
    """Prefill all but the last `QUESTION_TOKENS` tokens of the prompt, `chunk` tokens at a time, under a progress bar."""
    cache = DynamicCache(config=model.config)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    stop = max(0, ids.shape[1] - QUESTION_TOKENS)
    with torch.no_grad(), tqdm(total=stop, desc="prefill", unit=" tokens", file=sys.stdout, disable=not stop) as bar:
        for begin in range(0, stop, chunk):
            end = min(begin + chunk, stop)
            model(ids[:, begin:end], attention_mask=mask[:, :end], logits_to_keep=1, **{cache_argument(model): cache})
            bar.update(end - begin)
    return cache


def answer(model: Any, tokenizer: Any, inputs: dict[str, torch.Tensor], cache: Cache, max_new_tokens: int) -> Answer:
    """Stream the answer. `generate` reads the tokens that `cache` lacks, then decodes."""
    print("  answer: ", end="", flush=True)
    streamer = TimedStreamer(tokenizer)
    given = {**inputs, cache_argument(model): cache}
    output = model.generate(**given, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    new = output[0, inputs["input_ids"].shape[1] :]
    return Answer(tokenizer.decode(new, skip_special_tokens=True).strip(), streamer.times[1:])


def print_side_by_side(answers: dict[str, Answer]) -> None:
    """One row for each cache."""
    print(f"{'':10} {'2nd token s':>12} {'ms/token':>9}  answer")
    for name, answer in answers.items():
        lines = textwrap.wrap(answer.text, 84) or ["(nothing)"]
        print(f"{name:10} {answer.start_s:12.2f} {answer.ms_per_token:9.1f}  {lines[0]}")
        for line in lines[1:]:
            print(f"{'':34}{line}")


def main() -> None:
    """Load a model, read the text once, answer twice, compare."""
    args = parse_arguments()
    name = args.model or default_model()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        dtype = args.dtype or fastest_dtype(args.device)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(args.device).eval()
    except (OSError, ValueError) as error:
        sys.exit(f"--model: could not load {name} as a causal language model:\n{error}")

    if args.prompt_file is None:
        length = TEXT_TOKENS.get(model.device.type, TEXT_TOKENS["cpu"])
        text, question = hide_in_macbeth(tokenizer, length), args.question or HIDDEN_QUESTION
        print("The text: the opening of Macbeth, with a sentence about a passkey hidden in its middle.")
    else:
        text, question = args.text, args.question
        print(f"The text: {args.prompt_file}")
    inputs = {key: value.to(args.device) for key, value in build_inputs(tokenizer, text, question).items()}
    tokens = inputs["input_ids"].shape[1]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens + args.max_new_tokens > limit:
        sys.exit(
            f"The prompt has {tokens:,} tokens and the answer up to {args.max_new_tokens}, but the model was made for "
            f"{limit:,}: use a shorter --prompt-file or another --model."
        )
    print(f"The prompt: {tokens:,} tokens. The model: {name}, {model.dtype}, {model.device}.")
    if question:
        print(f"The question: {question}")
    if model.device.type == "cpu":
        print(
            "On a CPU a SpinCache step is slower than a dense one, and its first step clusters the text for some seconds."
        )
        print("SpinCache is made for long contexts on a GPU.")

    dense_cache = read_text(model, inputs, args.chunk)

    print(f"\nSpinCache, {args.method}, budget {args.budget}:")
    try:
        # A GPU would read all of so short a text, as that is faster than selecting.
        cache = SpinCache.from_cache(dense_cache, model, args.method, budget=args.budget, dense_below=0)
    except (ValueError, TypeError) as error:
        sys.exit(f"SpinCache: {error}")
    sparse = answer(model, tokenizer, inputs, cache, args.max_new_tokens)
    print()
    print(cache.stats())
    del cache

    print("\nDense attention, DynamicCache:")
    dense = answer(model, tokenizer, inputs, dense_cache, args.max_new_tokens)
    print()
    print_side_by_side({"SpinCache": sparse, "dense": dense})


if __name__ == "__main__":
    main()
