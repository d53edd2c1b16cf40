"""A question about a real text of several thousand tokens, answered through SpinCache and through dense attention.

    make demo
    python examples/demo.py --model Qwen/Qwen3-0.6B --prompt-file report.txt --question "Who wrote the report?"

Without `--prompt-file` the text is the opening of Shakespeare's Macbeth with one sentence hidden in its middle, which
Shakespeare did not write; the question asks for it. So a right answer can only come from the text, however much of the
play the model knows by heart.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import textwrap
import time
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
DEFAULT_TEXT_TOKENS = 3500


@dataclass
class Answer:
    """What one way of attending gave, and how long it took."""

    text: str
    prefill_s: float
    times: list[float]
    """Seconds from the prefill to each token; with the first one a method may put the prompt in an order of its own."""

    @property
    def ms_per_token(self) -> float:
        """Mean time of one decode step behind the first in milliseconds."""
        return 1000 * (self.times[-1] - self.times[0]) / max(1, len(self.times) - 1)


class TimedStreamer(TextStreamer):
    """Prints the answer, and remembers when each of its tokens came."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.start, self.times = time.perf_counter(), list[float]()

    def put(self, value: torch.Tensor) -> None:
        """Tokens came; the prompt first."""
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
    parser.add_argument("--method", default="bisection", help="how the tokens to attend to are chosen")
    parser.add_argument(
        "--budget", type=budget, default=512, help="tokens attended per KV head and step: 512, or a share such as 0.1"
    )
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--chunk", type=int, default=512, help="tokens per piece of the prefill, 64 or more")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
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


def hide_in_macbeth(tokenizer: Any) -> str:
    """The opening of Macbeth with `HIDDEN_SENTENCE` between two speeches near the middle."""
    text = play("macbeth")
    ids = tokenizer(text, add_special_tokens=False).input_ids[:DEFAULT_TEXT_TOKENS]
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


def ask(model: Any, tokenizer: Any, inputs: dict[str, torch.Tensor], cache: Cache, args: argparse.Namespace) -> Answer:
    """Prefill `cache` piece by piece under a progress bar, then stream the answer.

    `generate` then finds all but the last token of the prompt in the cache and goes on from there.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    renamed = "cache" in inspect.signature(model.forward).parameters  # from transformers 5.24 on
    given = {"cache" if renamed else "past_key_values": cache}
    last = ids.shape[1] - 1
    start = time.perf_counter()
    with torch.no_grad(), tqdm(total=last, desc="  prefill", unit=" tokens", file=sys.stdout) as bar:
        for begin in range(0, last, args.chunk):
            end = min(begin + args.chunk, last)
            model(ids[:, begin:end], attention_mask=mask[:, :end], **given, logits_to_keep=1)
            bar.update(end - begin)
    prefill_s = time.perf_counter() - start

    print("  answer:  ", end="", flush=True)
    streamer = TimedStreamer(tokenizer)
    output = model.generate(**inputs, **given, max_new_tokens=args.max_new_tokens, do_sample=False, streamer=streamer)
    new = output[0, ids.shape[1] :]
    return Answer(tokenizer.decode(new, skip_special_tokens=True).strip(), prefill_s, streamer.times[1:])


def print_side_by_side(answers: dict[str, Answer]) -> None:
    """One row per way of attending."""
    print(f"{'':10} {'prefill s':>10} {'first token s':>14} {'ms/token':>9}  answer")
    for name, answer in answers.items():
        lines = textwrap.wrap(answer.text, 84) or ["(nothing)"]
        print(f"{name:10} {answer.prefill_s:10.2f} {answer.times[0]:14.2f} {answer.ms_per_token:9.1f}  {lines[0]}")
        for line in lines[1:]:
            print(f"{'':47}{line}")


def main() -> None:
    """Load, ask twice, compare."""
    args = parse_arguments()
    name = args.model or default_model()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=args.dtype).to(args.device).eval()
    except (OSError, ValueError) as error:
        sys.exit(f"--model: could not load {name} as a causal language model:\n{error}")

    if args.prompt_file is None:
        text, question = hide_in_macbeth(tokenizer), args.question or HIDDEN_QUESTION
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

    with torch.no_grad():  # so that neither side pays for the first call
        model(inputs["input_ids"][:, :16], use_cache=False)

    print(f"\nSpinCache, {args.method}, budget {args.budget}:")
    try:
        cache = SpinCache(model, args.method, budget=args.budget)
    except (ValueError, TypeError) as error:
        sys.exit(f"SpinCache: {error}")
    sparse = ask(model, tokenizer, inputs, cache, args)
    print()
    print(cache.stats())
    del cache

    print("\nDense attention, DynamicCache:")
    dense = ask(model, tokenizer, inputs, DynamicCache(config=model.config), args)
    print()
    print_side_by_side({"SpinCache": sparse, "dense": dense})


if __name__ == "__main__":
    main()
