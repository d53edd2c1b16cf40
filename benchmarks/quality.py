"""How much of dense attention the methods keep at equal budgets: `python benchmarks/quality.py`.

    --model SmolLM2-135M-Instruct (default), or a folder or hub id     --shares 64 32 16 8
    --gates seer=DIR other=DIR                  methods of these names are SeerAttention with gates from a folder
    --methods shadowkv retroinfer quest ...     ":model" behind a name keeps summaries in the model's dtype instead of int8

Real text is prefilled once, densely, and its next lines are decoded from a `SpinCache` built from that prefill (teacher
forcing: every row sees the same tokens), for every method and budget of 1/64 to 1/8 of the context, beside 4 sinks and 64
recent tokens.

    KL           of the next-token distribution against the dense one, mean over steps, in nats
    mass         share of the softmax of all tokens that falls on those attended to, mean over steps, layers and query heads;
                 what a method estimates besides does not count
    of oracle    that mass over the mass of the best tokens: for each KV head the same number beside sinks and recent window,
                 by their weight summed over the head's group. Pages can reach 1 only if weights lie side by side.

Finished rows are kept in the results file and not measured again, so a run that was stopped goes on; `--again` starts anew.
Writes `benchmarks/results/quality-<model>.json` and prints a table.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import spin_hf.layer
from spin_hf import SeerAttention, SpinCache, __version__
from spin_hf.attention.gates import load_gates

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from models import default_model
from texts import play

RESULTS = Path(__file__).resolve().parent / "results"
PLAYS = ["macbeth", "hamlet", "othello"]
SINKS, RECENT = 4, 64
EVERY = 8
"""Mass is measured at every so many tokens, as it takes all keys; KL at all of them."""


class Mass:
    """Records what part of the attention a cache's selections keep, while it is the context.

    `select_pages` is called by every layer for every step; its pages, queries and the layer's keys say it all.
    """

    def __init__(self) -> None:
        self.kept: list[float] = []
        self.best: list[float] = []

    def __enter__(self) -> Mass:
        original = spin_hf.layer.select_pages

        def recording(call: Any, position: int, store: Any, plan: Any, *args: Any) -> Tensor:
            pages = original(call, position, store, plan, *args)
            if position % EVERY:
                return pages
            allowed = plan.allowed(pages, position)
            keys = store.pages(0, store.sequences.num_pages)[0].flatten(2, 3)[:, :, : position + 1].float()
            logits = call.query[:, :, :, 0].float() @ keys.transpose(-1, -2) * call.scale
            weights = logits.softmax(-1).sum(2)[0]  # [H, tokens]: what every token gets from the group
            group = call.query.shape[2]
            # Places in the pages, whatever tokens stand there, as of `keys`; sinks and recent tokens are never moved.
            tokens = (pages[0].unsqueeze(-1) * store.page_size + torch.arange(store.page_size)).flatten(1)
            for head, row in enumerate(weights):
                chosen = tokens[head][allowed[0, head]]
                self.kept.append(float(row[chosen].sum()) / group)
                always = torch.zeros_like(row, dtype=torch.bool)
                always[:SINKS], always[-RECENT:] = True, True
                others = row.masked_fill(always, 0.0)
                room = min(len(chosen) - int(always.sum()), len(row))
                self.best.append(float(row[always].sum() + others.topk(max(0, room)).values.sum()) / group)
            return pages

        self.patch = patch.object(spin_hf.layer, "select_pages", recording)
        self.patch.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.patch.stop()


@torch.no_grad()
def forced(model: Any, cache: Any, tokens: list[int]) -> Tensor:
    """Log-probabilities [steps, vocabulary] after each of `tokens`."""
    return torch.stack(
        [model(torch.tensor([[t]]), past_key_values=cache).logits[0, -1].float().log_softmax(-1) for t in tokens]
    )


def measure(
    model: Any,
    prefilled: DynamicCache,
    dense: Tensor,
    tokens: list[int],
    method: str,
    budget: int,
    gates: dict[str, str],
) -> dict[str, Any]:
    """One row."""
    method, _, dtype = method.partition(":")
    folder = gates.get(method)
    chosen = method if folder is None else SeerAttention(folder, page_size=load_gates(folder).page_size)
    cache = SpinCache.from_cache(
        prefilled, model, chosen, budget=budget, num_sink_tokens=SINKS, recent_window=RECENT,
        summary_dtype=dtype or "auto",
    )  # fmt: skip
    with Mass() as mass:
        sparse = forced(model, cache, tokens)
    kl = (dense.exp() * (dense - sparse)).sum(-1)
    kept, best = sum(mass.kept) / len(mass.kept), sum(mass.best) / len(mass.best)
    return {
        "kl": round(float(kl.mean()), 5), "kl_p90": round(float(kl.quantile(0.9)), 5),
        "top1_agrees": round(float((dense.argmax(-1) == sparse.argmax(-1)).float().mean()), 4),
        "mass": round(kept, 4), "oracle_mass": round(best, 4), "of_oracle": round(kept / best, 4),
        "attended_tokens": round(float(cache.stats().attended_tokens), 1),
    }  # fmt: skip


def main() -> None:
    """Measure what is missing, write JSON, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--gates", nargs="+", default=[], metavar="NAME=DIR", help="gates by name of a method")
    parser.add_argument(
        "--methods", nargs="+", default=["shadowkv", "shadowkv:model", "bisection", "retroinfer", "quest"]
    )
    parser.add_argument(
        "--shares", type=int, nargs="+", default=[64, 32, 16, 8], help="budgets: 1/share of the context"
    )
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--again", action="store_true", help="measure finished rows again")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    name, gates = args.model or default_model(), dict(entry.split("=", 1) for entry in args.gates)
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).eval()
    output = args.output or RESULTS / f"quality-{Path(name).name}.json"
    about = {
        "model": Path(name).name, "tokens": args.tokens, "steps": args.steps, "dtype": "bfloat16", "device": "cpu",
        "machine": platform.machine(), "num_sink_tokens": SINKS, "recent_window": RECENT,
        "versions": {"spin_hf": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }  # fmt: skip
    before = json.loads(output.read_text()) if output.exists() and not args.again else {}
    same = {key: before.get(key) for key in about} == about
    rows: dict[str, dict[str, Any]] = before.get("rows", {}) if same else {}
    cells = [(method, share) for method in args.methods for share in args.shares]
    with tqdm(total=len(PLAYS) * len(cells), unit=" rows") as bar:
        for title in PLAYS:
            missing = [cell for cell in cells if f"{cell[0]}, 1/{cell[1]}, {title}" not in rows]
            bar.update(len(cells) - len(missing))
            if not missing:
                continue
            ids = tokenizer(play(title), add_special_tokens=False).input_ids[: args.tokens + args.steps]
            if len(ids) < args.tokens + args.steps:
                parser.error(f"--tokens and --steps: expected at most {len(ids)} together for {title}")
            prefilled = DynamicCache(config=model.config)
            with torch.no_grad():
                model(torch.tensor([ids[: args.tokens]]), past_key_values=prefilled, logits_to_keep=1)
            following = ids[args.tokens :]
            dense = forced(model, deepcopy(prefilled), following)
            for method, share in missing:
                row = measure(model, prefilled, dense, following, method, args.tokens // share, gates)
                rows[f"{method}, 1/{share}, {title}"] = row
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
                bar.update()
    print("\n| method | " + " | ".join(f"1/{share}: KL, mass, of oracle" for share in args.shares) + " |")
    print("|---" * (len(args.shares) + 1) + "|")
    for method in args.methods:
        entries = []
        for share in args.shares:
            found = [rows[f"{method}, 1/{share}, {title}"] for title in PLAYS]
            mean = {key: sum(row[key] for row in found) / len(found) for key in ("kl", "mass", "of_oracle")}
            entries.append(f"{mean['kl']:.3f}, {mean['mass']:.3f}, {mean['of_oracle']:.1%}")
        print(f"| {method} | " + " | ".join(entries) + " |")


if __name__ == "__main__":
    main()
