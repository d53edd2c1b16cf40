"""Which pages a real model selects from step to step, and how many of them a buffer of page frames still holds.

    python -m benchmarks.memory.traces     4,000 tokens, 256 steps, budgets 128 to 512; 5 minutes on one core

A chat about Shakespeare's Macbeth is prefilled once, densely. Then every budget decodes from a `SpinCache` built from that
prefill, twice: the play's own next lines (`play`, the same tokens for every budget) and the model's greedy answer (`greedy`,
which soon repeats itself). What `select_pages` returns is recorded for every layer, KV head and step: first the pages that
are mandatory (sinks, recent window, the page being filled), then those that the method chose, outliers included.

    overlap     share of a step's chosen pages that were among the chosen pages of the step before (mandatory ones left out)
    hit rate    share of a step's chosen pages that the buffer holds; mandatory pages pass through it too, as in the cache,
                and are counted in `hit_rate_with_mandatory` only; the first step finds nothing and is left out

Each layer and KV head has (1 + multiple) times the most pages of a step as page frames: a step's own pages, and `multiple`
times as many buffer pages, for multiples of 0, 1, 2, 5 and 10. Victims: exact LRU (brute force, a step's pages touched in the
order of the list), the package's bucketed LRU (`admit_pages`), and Belady's, which knows the future and bounds the others.
`share_that_evicts` says how many of the buffers ever fill: where it is small, policies cannot differ, and a larger buffer
gains nothing. `buffers.py` measures the same multiples on a GPU. Writes `benchmarks/results/traces.json` and prints tables.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import spin_hf.backends.reference
from benchmarks.common.example_models import default_model, play
from benchmarks.common.record import RESULTS
from benchmarks.common.rows_file import command_line
from spin_hf import ShadowKV, SpinCache, __version__
from spin_hf.kernels import reference

QUESTION = "Continue the text."
BUFFERS = [0, 1, 2, 5, 10]
"""Buffer pages, as multiples of the most pages of a step; these have page frames beside."""
FOLLOWED = 5
"""The buffer whose misses are kept step by step."""
DISTANCES = [1, 4, 16, 64]


def build_prompt(tokenizer: Any, num_tokens: int, steps: int) -> tuple[Tensor, list[int]]:
    """Ids [1, num_tokens] of a chat that shows the play's beginning, and the `steps` tokens with which the play goes on."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    head = ids("<|im_start|>user\nHere is a text.\n\n")
    tail = ids(f"\n\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n")
    text, cut = ids(play("macbeth")), num_tokens - len(head) - len(tail)
    if cut <= 0 or cut + steps > len(text):
        raise SystemExit(
            f"benchmarks.memory.traces: expected {len(head) + len(tail) + 1} to {len(text) - steps} --tokens"
        )
    return torch.tensor([head + text[:cut] + tail]), text[cut : cut + steps]


@torch.no_grad()
def record(model: Any, last: int, cache: SpinCache, steps: int, follow: list[int] | None) -> tuple[Tensor, int]:
    """Decode `steps` tokens, those of `follow` or greedily, and record what is selected.

    Returns:
        [T, S, n], int64: the pages of every step and stream (a KV head of a layer), mandatory ones first; -1 for none.
        How many of the n columns are mandatory pages.
    """
    recorded: dict[int, list[tuple[Tensor, Tensor]]] = {}
    original = spin_hf.backends.reference.select_pages

    def recording(call: Any, position: int, layer: Any, plan: Any, *args: Any) -> Tensor:
        pages = original(call, position, layer, plan, *args)
        mandatory = plan.query(position, pages.device).fixed.shape[1]
        recorded.setdefault(position, []).append((pages[0, :, :mandatory], pages[0, :, mandatory:]))
        return pages

    with patch.object(spin_hf.backends.reference, "select_pages", recording):
        for step in range(steps):
            logits = model(torch.tensor([[last]]), past_key_values=cache).logits
            last = follow[step] if follow is not None else int(logits[0, -1].argmax())
    if len(recorded) != steps or {len(layers) for layers in recorded.values()} != {model.config.num_hidden_layers}:
        raise SystemExit("benchmarks.memory.traces: expected a selection by every layer and step; lower --budgets")
    mandatory, chosen = (
        pad_sequence([torch.cat([pages[part] for pages in layers]).T for layers in recorded.values()], True, -1).mT
        for part in range(2)
    )
    return torch.cat([mandatory, chosen], 2), mandatory.shape[2]


def as_sets(trace: Tensor, num_pages: int) -> Tensor:
    """Whether a page is among those of a step: [T, S, num_pages], bool, from page numbers [T, S, n]."""
    sets = torch.zeros((*trace.shape[:2], num_pages + 1), dtype=torch.bool)
    return sets.scatter_(2, trace.where(trace >= 0, num_pages), True)[..., :num_pages]


def overlaps(sets: Tensor, distance: int) -> Tensor:
    """Share of each step's pages that were in the set `distance` steps before: [T - distance, S]."""
    return (sets[distance:] & sets[:-distance]).sum(2) / sets[distance:].sum(2)


def exact_lru(trace: Tensor, capacity: int, num_pages: int) -> Tensor:
    """Which pages of `trace` [T, S, n] miss when the page touched longest ago goes first: [T, S, n], bool."""
    missed = torch.zeros_like(trace, dtype=torch.bool)
    for stream in range(trace.shape[1]):
        resident: OrderedDict[int, None] = OrderedDict()
        for step, pages in enumerate(trace[:, stream].tolist()):
            absent = [(i, page) for i, page in enumerate(pages) if page >= 0 and page not in resident]
            for page in pages:
                if page in resident:
                    resident.move_to_end(page)
            for i, page in absent:
                if len(resident) == capacity:
                    resident.popitem(last=False)
                resident[page] = None
                missed[step, stream, i] = True
    return missed


def bucketed_lru(trace: Tensor, capacity: int, num_pages: int) -> Tensor:
    """The same with the package's residency, whose specification is `admit_pages`."""
    streams = trace.shape[1]
    page_slot = torch.full((1, streams, num_pages), -1, dtype=torch.int32)
    slot_page = torch.full((1, streams, capacity), -1, dtype=torch.int32)
    slot_step = torch.zeros((1, streams, capacity), dtype=torch.int64)
    return torch.cat(
        [reference.admit_pages(page_slot, slot_page, slot_step, p[None], step)[1] for step, p in enumerate(trace)]
    )


def belady(trace: Tensor, capacity: int, num_pages: int) -> Tensor:
    """The same when the page whose next use is farthest off goes first (none of the present step)."""
    sets = as_sets(trace, num_pages)
    next_use = torch.full(sets.shape, len(sets), dtype=torch.int32)
    for step in range(len(sets) - 2, -1, -1):
        next_use[step] = torch.where(sets[step + 1], step + 1, next_use[step + 1])
    resident, missed = torch.zeros_like(sets[0]), torch.zeros_like(sets)
    for step, now in enumerate(sets):
        missed[step] = now & ~resident
        resident |= now
        logit_correction = resident.sum(1, keepdim=True) - capacity
        order = next_use[step].masked_fill(~resident | now, -1).argsort(dim=1, descending=True)
        keep = torch.arange(num_pages).expand_as(order) >= logit_correction
        resident &= torch.zeros_like(resident).scatter_(1, order, keep)
    return missed.gather(2, trace.clamp(min=0)) & (trace >= 0)


def hit_rate(trace: Tensor, missed: Tensor) -> float:
    """Share of pages asked for after the first step that did not miss, in percent."""
    return round(100 * (1 - float(missed[1:].sum()) / float((trace[1:] >= 0).sum())), 2)


def evaluate(trace: Tensor, mandatory: int, num_layers: int, budget: int) -> dict[str, Any]:
    """Overlaps and hit rates of one trace [T, S, n] whose first `mandatory` columns are mandatory pages."""
    num_pages, chosen = int(trace.max()) + 1, trace[..., mandatory:]
    sets, chosen_sets = as_sets(trace, num_pages), as_sets(chosen, num_pages)
    near = overlaps(chosen_sets, 1)
    step_pages = int((trace >= 0).sum(2).max())
    seen = (sets.int().cumsum(0) - sets.int() > 0).gather(2, chosen.clamp(min=0))
    buffers: dict[str, Any] = {}
    for multiple in BUFFERS:
        frames = (1 + multiple) * step_pages
        evicts = (sets.any(0).sum(1) > frames).float().mean()
        row: dict[str, Any] = {"frames": frames, "share_that_evicts": round(float(evicts), 4)}
        for name, policy in {"exact_lru": exact_lru, "bucketed_lru": bucketed_lru, "belady": belady}.items():
            missed = policy(trace, frames, num_pages)
            rates = [hit_rate(chosen, missed[..., mandatory:]), hit_rate(trace, missed)]
            row[name] = dict(zip(["hit_rate", "hit_rate_with_mandatory"], rates, strict=True))
            if name == "bucketed_lru" and multiple == FOLLOWED:
                new = missed[1:, :, mandatory:].float().mean((1, 2))
        row["bucketed_minus_exact_points"] = round(row["bucketed_lru"]["hit_rate"] - row["exact_lru"]["hit_rate"], 2)
        buffers[str(multiple)] = row
    return {
        "pages": num_pages, "step_pages": step_pages, "chosen_pages": chosen.shape[2],
        "outlier_pages": int(ShadowKV().num_outlier_pages(torch.tensor(budget))),
        "overlap": {
            "mean": round(float(near.mean()), 4),
            **{f"p{q}": round(float(near.quantile(q / 100)), 4) for q in (10, 50, 90)},
            "mean_with_mandatory": round(float(overlaps(sets, 1).mean()), 4),
            "mean_at_distance": {str(d): round(float(overlaps(chosen_sets, d).mean()), 4) for d in DISTANCES},
            "mean_per_layer": [round(v, 4) for v in near.mean(0).view(num_layers, -1).mean(1).tolist()],
        },
        "buffers": buffers,
        "never_asked_for_before": round(1 - float(seen[1:].float().mean()), 4),
        "new_pages": {  # misses of the buffer FOLLOWED under bucketed LRU, as a share of the chosen pages
            "buffer": FOLLOWED,
            "mean": round(float(new.mean()), 4), "mean_second_half": round(float(new[len(new) // 2 :].mean()), 4),
            "per_step": [round(v, 4) for v in new.tolist()],
        },
    }  # fmt: skip


def main() -> None:
    """Record all budgets, write JSON, print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--budgets", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--output", type=Path, default=RESULTS / "traces.json")
    args = parser.parse_args()
    if args.steps <= max(DISTANCES):
        parser.error(f"--steps: expected more than {max(DISTANCES)}, got {args.steps}")

    started, name = time.perf_counter(), args.model or default_model()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).eval()
    prompt, following = build_prompt(tokenizer, args.tokens, args.steps)
    prefilled = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt[:, :-1], past_key_values=prefilled, logits_to_keep=1)
    rows: dict[str, dict[str, Any]] = {}
    for budget in tqdm(args.budgets, unit=" budgets"):
        for text, follow in {"play": following, "greedy": None}.items():
            cache = SpinCache.from_cache(prefilled, model, "shadowkv", budget=budget)
            trace, mandatory = record(model, int(prompt[0, -1]), cache, args.steps, follow)
            rows[f"budget {budget}, {text}"] = evaluate(trace, mandatory, model.config.num_hidden_layers, budget)
    result = {
        "command": command_line("memory.traces", args.model).replace(f" --output {args.output}", ""),
        "model": Path(name).name, "tokens": args.tokens, "steps": args.steps, "dtype": "bfloat16", "device": "cpu",
        "machine": platform.machine(), "method": "shadowkv", "page_size": ShadowKV.page_size, "num_sink_tokens": 4,
        "recent_window": 64,
        "versions": {
            "spin_hf": __version__, "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seconds": round(time.perf_counter() - started), "rows": rows,
    }  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    text = re.sub(r"\[[\d\s.,]+\]", lambda found: " ".join(found[0].split()), json.dumps(result, indent=1))
    args.output.write_text(text + "\n")  # a list of numbers is one line
    print(
        f"\n| chosen pages | overlap | p10 | p50 | p90 | 16 steps apart | new with a buffer of {FOLLOWED}, second half | "
        "never before |\n|" + "---|" * 8
    )
    for label, row in rows.items():
        shares = [row["overlap"][key] for key in ("mean", "p10", "p50", "p90")]
        shares += [row["overlap"]["mean_at_distance"]["16"], row["new_pages"]["mean_second_half"]]
        shares += [row["never_asked_for_before"]]
        print(f"| {label}: {row['chosen_pages']} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    print(
        "\n| buffer pages / a step's | frames | of pages | evicting | exact LRU | bucketed LRU | points | Belady |\n|"
        + "---|" * 8
    )
    for label, row in rows.items():
        for multiple, entry in row["buffers"].items():
            lru, bucketed, best = (entry[policy]["hit_rate"] for policy in ("exact_lru", "bucketed_lru", "belady"))
            print(
                f"| {label}: {multiple} | {entry['frames']} | {row['pages']} | {entry['share_that_evicts']:.0%} | "
                f"{lru:.2f} % | {bucketed:.2f} % | {entry['bucketed_minus_exact_points']:+.2f} | {best:.2f} % |"
            )


if __name__ == "__main__":
    main()
