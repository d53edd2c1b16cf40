"""Quality and time per token over a long output: `python -m benchmarks.quality.long_outputs --model MODEL`.

    --model FOLDER or hub id     --device cpu (default) cuda     --dtype bfloat16 (default) float16 float32
    --prompt 1024     --tokens 31744           read at once, and then decoded one by one; both of the same text
    --text FILE ...                            default: the play Hamlet
    --methods fitted dense (default)           dense: all tokens are attended to, by the same cache
    --rectify 0 (default) 1024                 tokens are read again at this interval (`rectify_interval`)
    --budgets 2048 512 (default)               in tokens, or 1/64 of prompt and tokens
    --rope-scaling yarn:4                      for texts longer than the model was trained on
    --seconds 500                              from the start of the command: then stop. What was measured is in the file

The real text is fed token by token (teacher forcing), so every row sees the same tokens, and nothing is attended to densely
but the prompt (`dense_below=0`). The reference is one ordinary forward of the same text in chunks, with a `DynamicCache`. Its
logits stay on the device: 9 GiB for 31,744 tokens and Qwen's vocabulary in bfloat16.

    KL        of the next-token distribution against the reference, mean over steps, in nats. That of `dense` is rounding
    NLL       of the text's next token, mean over steps, in nats
    ms        of a step, from the call until the device is done: the host prepares no step while the device runs another
    events    what else a step did: steps in which tokens were clustered, in which a graph was captured or its shape first
              run, in which a segment of pages was begun, and all others. "slow" are those above twice the median of all

A row is a text, method, budget and 4,096 generated tokens. Rows of a text, method and budget are measured in one go; a run
that was stopped measures those again that are not complete, and all with `--again`. Writes `long-outputs-<model>.json` into
`--output` (default: `benchmarks/results`) and prints a table.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, DynamicCache

from benchmarks.common.example_models import play
from benchmarks.common.inspection import num_clustered_pages, num_graphs, num_segments
from benchmarks.common.record import RESULTS
from benchmarks.common.rows_file import Rows, command_line
from benchmarks.common.timing import free, wait_for_device
from benchmarks.quality.chosen_tokens import RECENT, SINKS
from benchmarks.quality.prefill import add_model_options, add_rope_option, load_model, rope_about
from benchmarks.quality.run_options import about_rows
from spin_hf import SpinCache

BUCKET = 4096
"""Generated tokens of a row."""
READ = 1024
"""Tokens that the reference reads at a time."""
COMPARED = 256
"""Steps whose logits are held until they are compared."""
SHOWN = 16
"""Slow steps of a row that are recorded one by one, at most: number within the row, ms, event."""
PLAY = "hamlet"
EVENTS = ("tokens clustered", "graph captured", "segment begun")
OTHER = "none"


@dataclass(frozen=True)
class Cell:
    """A method and budget.

    Attributes:
        method: of `SpinCache`, or `dense`.
        budget: as it was given; "all" for `dense`.
        tokens: the budget in tokens.
        rectify: `rectify_interval`; None for none.
    """

    method: str
    budget: str
    tokens: int
    rectify: int | None = None

    def cache(self, model: Any) -> SpinCache:
        """A new cache."""
        if self.method == "dense":
            return SpinCache(model, dense_below=1 << 30)
        return SpinCache(
            model, self.method, budget=self.tokens, num_sink_tokens=SINKS, recent_window=RECENT, dense_below=0,
            rectify_interval=self.rectify,
        )  # fmt: skip

    def row(self, text: str, first: int) -> str:
        """The name of the row that begins with this generated token, from 0."""
        method = f"{self.method} (read again every {self.rectify})" if self.rectify else self.method
        return f"{text}, {method}, {self.budget}, {first}"


class Text:
    """A text, and what dense attention says of it.

    Attributes:
        ids: [1, prompt + tokens + 1], on the model's device.
        dense: logits behind each decoded token, [tokens, vocabulary], in the model's dtype, on its device.
    """

    def __init__(self, model: Any, title: str, ids: list[int], prompt: int) -> None:
        self.title, self.prompt = title, prompt
        self.ids = torch.tensor([ids], device=model.device)
        self.tokens = len(ids) - prompt - 1
        self.dense = torch.empty(0)
        self._read(model)

    @torch.no_grad()
    def _read(self, model: Any) -> None:
        cache = DynamicCache(config=model.config)
        for first in range(0, self.prompt, READ):
            stop = min(first + READ, self.prompt)
            model(self.ids[:, first:stop], past_key_values=cache, logits_to_keep=1)
        for first in range(0, self.tokens, READ):
            stop = min(first + READ, self.tokens)
            chunk = self.ids[:, self.prompt + first : self.prompt + stop]
            logits = model(chunk, past_key_values=cache).logits[0]
            if not first:
                self.dense = logits.new_empty(self.tokens, logits.shape[-1])
            self.dense[first:stop] = logits

    def labels(self, first: int, stop: int) -> Tensor:
        """The tokens that follow the decoded ones from `first` to `stop`."""
        return self.ids[0, self.prompt + first + 1 : self.prompt + stop + 1]


@dataclass
class Steps:
    """What was measured of steps, in their order."""

    kl: list[float] = field(default_factory=list)
    same: list[float] = field(default_factory=list)
    nll_dense: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)
    events: list[str] = field(default_factory=list)

    def compare(self, dense: Tensor, sparse: Tensor, labels: Tensor) -> None:
        """Add the quality of steps.

        Args:
            dense, sparse: logits, [steps, vocabulary].
            labels: the text's next tokens, [steps].
        """
        expected, found = dense.float().log_softmax(-1), sparse.float().log_softmax(-1)
        self.nll_dense += (-expected.gather(1, labels[:, None])).flatten().tolist()
        self.nll += (-found.gather(1, labels[:, None])).flatten().tolist()
        self.same += (expected.argmax(-1) == found.argmax(-1)).float().tolist()
        self.kl += (expected.exp() * (expected - found)).sum(-1).tolist()

    def row(self) -> dict[str, Any]:
        """Means, times, and how steps with an event compare with others."""
        median = statistics.median(self.ms)
        events = {}
        for name in (*EVENTS, OTHER):
            ms = [took for took, event in zip(self.ms, self.events, strict=True) if event == name]
            if ms:
                events[name] = {
                    "steps": len(ms), "slow": sum(took > 2 * median for took in ms),
                    "median_ms": round(statistics.median(ms), 3), "max_ms": round(max(ms), 3),
                }  # fmt: skip
        slow = sorted((took, place) for place, took in enumerate(self.ms) if took > 2 * median)
        slowest = [[place + 1, round(took, 3), self.events[place]] for took, place in slow[: -SHOWN - 1 : -1]]
        return {
            "steps": len(self.ms), "kl": round(statistics.fmean(self.kl), 5),
            "kl_p90": round(float(torch.tensor(self.kl).quantile(0.9)), 5),
            "top1_agrees": round(statistics.fmean(self.same), 4),
            "nll_dense": round(statistics.fmean(self.nll_dense), 4), "nll": round(statistics.fmean(self.nll), 4),
            "median_ms": round(median, 3), "max_ms": round(max(self.ms), 3), "events": events,
            "slowest": slowest,
        }  # fmt: skip


class Watch:
    """Says what a step did besides decoding."""

    def __init__(self, cache: SpinCache) -> None:
        self.cache = cache
        self.seen = self._now()

    def _now(self) -> tuple[int, ...]:
        return num_clustered_pages(self.cache), num_graphs(self.cache), num_segments(self.cache)

    def event(self) -> str:
        """The first of `EVENTS` that has happened since the last call; `OTHER` if none has."""
        before, self.seen = self.seen, self._now()
        changed = [name for name, was, now in zip(EVENTS, before, self.seen, strict=True) if was != now]
        return changed[0] if changed else OTHER


@torch.no_grad()
def decode(model: Any, cache: SpinCache, text: Text, most: int) -> Iterator[tuple[int, Steps]]:
    """Read the prompt, then decode the text.

    Yields:
        After at most `most` steps: the first generated token of the row that they belong to, and all steps of that row so far.
    """
    model(text.ids[:, : text.prompt], past_key_values=cache, logits_to_keep=1)
    watch, steps = Watch(cache), Steps()
    for first in range(0, text.tokens, most):
        if first % BUCKET == 0:
            steps = Steps()
        stop, found = min(first + most, text.tokens), []
        for place in range(first, stop):
            token = text.ids[:, text.prompt + place : text.prompt + place + 1]
            wait_for_device()
            began = time.perf_counter()
            logits = model(token, past_key_values=cache).logits
            wait_for_device()
            steps.ms.append((time.perf_counter() - began) * 1e3)
            steps.events.append(watch.event())
            found.append(logits[0, -1])
        steps.compare(text.dense[first:stop], torch.stack(found), text.labels(first, stop))
        yield first // BUCKET * BUCKET, steps


def is_complete(rows: Rows, cell: Cell, title: str, tokens: int) -> bool:
    """Whether all rows of a text, method and budget are in the file."""
    names = {cell.row(title, first): min(BUCKET, tokens - first) for first in range(0, tokens, BUCKET)}
    return all(name in rows and rows[name]["steps"] == steps for name, steps in names.items())


def measure(model: Any, cell: Cell, text: Text, rows: Rows, deadline: float, bar: Any) -> None:
    """Write the rows of a text, method and budget, until the time is over."""
    cache = cell.cache(model)
    done = 0
    for first, steps in decode(model, cache, text, COMPARED):
        attended = float(cache.stats().attended_tokens)
        known = {} if math.isnan(attended) else {"attended_tokens": round(attended, 1)}
        rows.put(cell.row(text.title, first), {**steps.row(), **known})
        bar.update(first + len(steps.ms) - done)
        done = first + len(steps.ms)
        if time.monotonic() > deadline:
            break


def budget_of(text: str, length: int) -> int:
    """Tokens of a budget: of `512`, or `1/64` of the length.

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    head, slash, share = text.partition("/")
    tokens = int(head) if head.isdecimal() else 0
    if slash:
        tokens = length // int(share) if head == "1" and share.isdecimal() and int(share) else 0
    if tokens < 1:
        raise argparse.ArgumentTypeError(f"expected a number of tokens, or a share such as 1/64, got {text!r}")
    return tokens


def cells_of(methods: list[str], budgets: list[str], length: int, rectify: Sequence[int] = (0,)) -> list[Cell]:
    """Every method at every budget and interval of `rectify`, 0 for none; `dense` has one budget and no interval."""
    made = []
    for method in methods:
        dense = method == "dense"
        for budget in ["all"] if dense else budgets:
            tokens = length if dense else budget_of(budget, length)
            made += [Cell(method, budget, tokens, interval or None) for interval in ([0] if dense else rectify)]
    return made


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, with the cells that are to be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=31744)
    parser.add_argument("--text", type=Path, nargs="+", help="files (default: a play)")
    parser.add_argument("--methods", nargs="+", default=["fitted", "dense"])
    parser.add_argument("--budgets", nargs="+", default=["2048", "512"])
    parser.add_argument(
        "--rectify", type=int, nargs="+", default=[0], help="intervals of `rectify_interval`, 0 for none"
    )
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--again", action="store_true", help="measure complete rows again")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of results")
    add_model_options(parser)
    add_rope_option(parser)
    args = parser.parse_args(arguments)
    if args.prompt < 1 or args.tokens < 1:
        parser.error(f"--prompt, --tokens: expected 1 or more, got {args.prompt} and {args.tokens}")
    try:
        args.cells = cells_of(args.methods, args.budgets, args.prompt + args.tokens, args.rectify)
    except argparse.ArgumentTypeError as error:
        parser.error(f"--budgets: {error}")
    return args


def texts_of(files: list[Path] | None) -> dict[str, str]:
    """Texts by title."""
    return {file.stem: file.read_text() for file in files} if files else {PLAY: play(PLAY)}


def ids_of_text(tokenizer: Any, title: str, text: str, count: int) -> list[int]:
    """The first ids of a text.

    Raises:
        ValueError: there are not as many.
    """
    ids: list[int] = tokenizer(text).input_ids[:count]
    if len(ids) < count:
        raise ValueError(f"{title}: expected {count} tokens, got {len(ids)}; lower --tokens, or pass a longer --text")
    return ids


def check_length(model: Any, length: int) -> None:
    """Check that the model was trained on contexts of this length.

    Raises:
        ValueError: only on shorter ones.
    """
    most = model.config.get_text_config().max_position_embeddings
    if length > most:
        raise ValueError(
            f"expected at most {most} tokens of prompt and output, got {length}; lower --tokens, or pass --rope-scaling yarn:2"
        )


def table(result: dict[str, Any], title: str) -> list[str]:
    """The rows of a text."""
    heads = ("method", "budget", "generated tokens", "KL", "same best token", "NLL, dense", "NLL", "ms, median", "ms, maximum",
             "steps above twice the median", "of these, clustering", "graph captured", "other")  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for name, row in result["rows"].items():
        of_text, method, budget, first = name.rsplit(", ", 3)
        if of_text != title:
            continue
        slow = {event: found["slow"] for event, found in row["events"].items()}
        total = sum(slow.values())
        clustering, captured = (slow.get(event, 0) for event in EVENTS[:2])
        cells = (
            method, budget, f"{int(first) + 1:,} to {int(first) + row['steps']:,}", f"{row['kl']:.4f}",
            f"{row['top1_agrees']:.1%}", f"{row['nll_dense']:.3f}", f"{row['nll']:.3f}", f"{row['median_ms']:.2f}",
            f"{row['max_ms']:.2f}", str(total), str(clustering), str(captured), str(total - clustering - captured),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def tables(results: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """A table for each file and text, with its title."""
    found = []
    for result in results:
        for text in dict.fromkeys(name.rsplit(", ", 3)[0] for name in result["rows"]):
            parts = (result["model"], result.get("rope_scaling"), text, f"a prompt of {result['prompt']:,} tokens")
            found.append((", ".join(filter(None, parts)), table(result, text)))
    return found


def main() -> None:
    """Measure what is missing, write JSON, print tables."""
    began, args = time.monotonic(), parse()
    name, length = args.model, args.prompt + args.tokens
    about = about_rows(args, length, prompt=args.prompt, generated=args.tokens, **rope_about(args))
    command = command_line("quality.long_outputs", name, str(args.output), *map(str, args.text or []))
    rows = Rows(args.output / f"long-outputs-{Path(name).name}.json", about, command, args.again)
    model = load_model(name, args.dtype, args.device, args.rope_scaling)
    tokenizer = AutoTokenizer.from_pretrained(name)
    check_length(model, length)
    deadline, texts = began + args.seconds, texts_of(args.text)
    with tqdm(total=len(texts) * len(args.cells) * args.tokens, unit=" tokens") as bar:
        for title, text in texts.items():
            missing = [cell for cell in args.cells if not is_complete(rows, cell, title, args.tokens)]
            bar.update((len(args.cells) - len(missing)) * args.tokens)
            if not missing or time.monotonic() > deadline:
                continue
            made = Text(model, title, ids_of_text(tokenizer, title, text, length + 1), args.prompt)
            for cell in missing:
                if time.monotonic() < deadline:
                    free()
                    measure(model, cell, made, rows, deadline, bar)
    for title, lines in tables([{**about, "rows": rows.rows}]):
        print(f"\n{title}\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
