"""How much of dense attention the methods keep at equal budgets: `python -m benchmarks.quality.quality`.

    --model SmolLM2-135M-Instruct (default), or a folder or hub id     --tokens 4000     --shares 64 32 16 8     --kvpress
    --methods shadowkv shadowkv:model bisection retroinfer quest oracle window
                                                ":model" keeps summaries in the model's dtype, not int8
                                                "+int8pages" pages everything, in the cpu tier as int8 (cpu_dtype="int8")
                                                two-bit-keys:model is a rival of benchmarks only (`two_bit_keys.py`)
    --gates seer=DIR other=DIR                  methods of these names are SeerAttention with gates from a folder
    --dtype bfloat16 (default) float16 float32  --device cpu (default) cuda    on a GPU too methods choose by their formulas

Real text is prefilled once, densely, and its next lines are decoded from that prefill (teacher forcing: every row sees the
same tokens), for every method and budget of 1/64 to 1/8 of the context, beside 4 sinks and 64 recent tokens: from a
`SpinCache` made from the prefill (`prefill.py`), or from the prefill itself by a mask inside attention (`oracle` and
`window`, see `chosen_tokens.py`), or by kvpress (`--kvpress`, see `kvpress_worker.py`). Those others get as many tokens as
`shadowkv` attends to at the same budget.

    KL           of the next-token distribution against the dense one, mean over steps, in nats
    mass         share of the softmax of all tokens that falls on those attended to, mean over steps, layers and query heads;
                 what a method estimates besides does not count
    of oracle    that mass over the mass of the best tokens: for each KV head the same number beside sinks and recent window,
                 by their weight summed over the head's group. Pages can reach 1 only if weights lie side by side.

The file has mass and that of the best tokens for every layer and KV head. Finished rows are not measured again, so a run that
was stopped goes on; `--again` starts anew. Writes `benchmarks/results/quality-<model>.json` and prints a table.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

import spin_hf.backends.reference
import spin_hf.kernels
from benchmarks.common.example_models import play
from benchmarks.common.rows_file import Rows
from benchmarks.quality import kvpress_rivals, run_options
from benchmarks.quality.chosen_tokens import RECENT, SINKS, Chosen, Mass, chooser
from benchmarks.quality.divergence import divergence
from benchmarks.quality.prefill import Prefill, load_model
from benchmarks.quality.quality_tables import kl_table
from benchmarks.quality.two_bit_keys import TwoBitKeys
from spin_hf import SeerAttention, plan
from spin_hf.attention.methods.seer_gate_file import load_gates

PLAYS = ("macbeth", "hamlet", "othello")
METHODS = ["shadowkv", "shadowkv:model", "bisection", "retroinfer", "quest", "oracle", "window"]
EVERY = 8
"""Mass is measured at every so many tokens, as it takes all keys; KL at all of them."""


def recording(mass: Mass) -> Any:
    """A context in which a SpinCache's selections are recorded: `select_pages` is called by every layer for every step."""
    original = spin_hf.backends.reference.select_pages

    def select_pages(call: Any, position: int, layer: Any, plan: Any, method: Any) -> Tensor:
        pages, store = original(call, position, layer, plan, method), layer.store
        if position % EVERY == 0:
            keys = store.pages(store.sequences.num_pages)[0][0, :, : position + 1].float()
            logits = call.query[0, :, :, 0].float() @ keys.transpose(-1, -2) * call.scale
            shares = logits.softmax(-1).mean(1)  # [H, tokens]: what every token gets from the group
            # Places in the pages, whatever tokens stand there, as of `keys`; sinks and recent tokens are never moved.
            tokens = (
                pages[0].unsqueeze(-1) * store.page_size + torch.arange(store.page_size, device=pages.device)
            ).flatten(1)
            chosen = torch.zeros_like(shares, dtype=torch.bool)
            for head, allowed in enumerate(plan.allowed(pages, position)[0]):
                chosen[head, tokens[head][allowed]] = True
            mass.add(layer.number, shares, chosen)
        return pages

    return patch.object(spin_hf.backends.reference, "select_pages", select_pages)


@torch.no_grad()
def forced(model: Any, cache: Any, tokens: list[int]) -> Tensor:
    """Log-probabilities [steps, vocabulary] after each of `tokens`."""
    return torch.stack(
        [
            model(torch.tensor([[t]], device=model.device), past_key_values=cache)
            .logits[0, -1]
            .float()
            .log_softmax(-1)
            .cpu()
            for t in tokens
        ]
    )


def paged(model: Any, method: Any, length: int, pages: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options for a context of `length` tokens that lives in the cpu tier, with as many page frames as do not hold it."""
    if pages != "int8pages":
        raise ValueError(f"expected +int8pages behind a method, got +{pages}")
    whole = plan(model, context_length=length, method=method, dtype=model.dtype, **options)
    return {"gpu_memory": whole.gpu_bytes * 3 // 4, "cpu_dtype": "int8"}


def measure(
    model: Any,
    prefill: Prefill,
    dense: Tensor,
    tokens: list[int],
    method: str,
    budget: int,
    equal: int | None,
    gates: dict[str, str],
) -> dict[str, Any]:
    """One row; `equal` is how many tokens a method that is no SpinCache's attends to."""
    mass = Mass()
    if method in ("oracle", "window"):
        assert equal is not None, "shadowkv comes first"
        with Chosen(model, chooser(method, equal), mass, EVERY):
            sparse, attended = forced(model, prefill.dense(), tokens), float(equal)
    else:
        name, _, pages = method.partition("+")
        name, _, dtype = name.partition(":")
        folder = gates.get(name)
        chosen: Any = TwoBitKeys() if name == TwoBitKeys.name else name
        if folder is not None:
            chosen = SeerAttention(folder, page_size=load_gates(folder).page_size)
        options: dict[str, Any] = dict(
            budget=budget, num_sink_tokens=SINKS, recent_window=RECENT, summary_dtype=dtype or "int8"
        )
        if pages:
            options |= paged(model, chosen, prefill.whole.get_seq_length() + len(tokens), pages, options)
        with patch.object(spin_hf.kernels, "launchers", lambda device: None), recording(mass):  # kernels record nothing
            cache = prefill.sparse(chosen, **options)
            assert bool(pages) == (cache.stats().cpu_bytes > 0)
            sparse = forced(model, cache, tokens)
        attended = float(cache.stats().attended_tokens)
    kept, best = float(mass.kept.mean()), float(mass.best.mean())
    return {
        **divergence(dense, sparse), "mass": round(kept, 4), "oracle_mass": round(best, 4),
        "of_oracle": round(kept / best, 4), "attended_tokens": round(attended, 1),
        "mass_by_head": [[round(value, 3) for value in layer] for layer in mass.kept.tolist()],
        "oracle_mass_by_head": [[round(value, 3) for value in layer] for layer in mass.best.tolist()],
    }  # fmt: skip


class Text:
    """One play: the tokens that are prefilled, and those that are forced behind them."""

    def __init__(self, model: Any, tokenizer: Any, title: str, num_tokens: int, steps: int) -> None:
        ids = tokenizer(play(title)).input_ids[: num_tokens + steps]  # begins as the model's texts do
        if len(ids) < num_tokens + steps:
            raise ValueError(f"expected at most {len(ids)} tokens and steps for {title}, got {num_tokens + steps}")
        self.ids, self.following = ids[:num_tokens], ids[num_tokens:]
        self.prefill = Prefill(model, self.ids)
        self.dense = forced(model, self.prefill.dense(), self.following)


def equal_tokens(rows: Rows, share: int, title: str) -> int | None:
    """How many tokens `shadowkv` attends to at this budget; None if that is not measured."""
    name = f"shadowkv, 1/{share}, {title}"
    return round(rows[name]["attended_tokens"]) if name in rows else None


def ask_kvpress(name: str, texts: Iterator[tuple[str, Text]], rows: Rows, shares: list[int], bar: Any) -> None:
    """Add the rows of kvpress that are missing."""
    with tempfile.TemporaryDirectory() as scratch:
        cases = []
        for title, text in texts:
            dense = Path(scratch) / f"{title}.safetensors"
            save_file({"dense": text.dense}, dense)
            kept = {
                (press, share): equal_tokens(rows, share, title) or 0
                for press in kvpress_rivals.PRESSES for share in shares
                if f"{kvpress_rivals.cell(press, share)}, {title}" not in rows
            }  # fmt: skip
            ids = [*text.ids, text.following[0]]
            task = {"following": text.following[1:], "dense": str(dense)}
            cases.append(kvpress_rivals.case(title, ids, len(ids), kept, **task))
        for title, cell, reply in kvpress_rivals.ask(name, cases):
            rows.put(f"{cell}, {title}", reply)
            bar.update()


def main() -> None:
    """Measure what is missing, write JSON, print a table."""
    parser = run_options.parser(__doc__, METHODS, 4000)
    parser.add_argument("--gates", nargs="+", default=[], metavar="NAME=DIR", help="gates by name of a method")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--plays", nargs="+", default=list(PLAYS))
    args = run_options.parse(parser)
    gates = dict(entry.split("=", 1) for entry in args.gates)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = load_model(args.model, args.dtype, args.device)
    if args.kvpress and set(getattr(model.config, "layer_types", ())) - {"full_attention"}:
        parser.error("--kvpress: expected a model whose layers all attend to everything; its presses are for those")
    rows = run_options.open_rows("quality", args, steps=args.steps)
    cells = [(method, share) for method in args.methods for share in args.shares]
    presses = [kvpress_rivals.cell(p, s) for p in kvpress_rivals.PRESSES for s in args.shares if args.kvpress]
    texts: dict[str, Text] = {}

    def text(title: str) -> Text:
        if title not in texts:
            texts.clear()  # one prefill at a time
            texts[title] = Text(model, tokenizer, title, args.tokens, args.steps)
        return texts[title]

    with tqdm(total=len(args.plays) * (len(cells) + len(presses)), unit=" rows") as bar:
        for title in args.plays:
            for method, share in cells:
                key = f"{method}, 1/{share}, {title}"
                if key not in rows:
                    of, equal = text(title), equal_tokens(rows, share, title)
                    budget = args.tokens // share
                    rows.put(key, measure(model, of.prefill, of.dense, of.following, method, budget, equal, gates))
                bar.update()
            bar.update(sum(f"{cell}, {title}" in rows for cell in presses))
        open_for = [title for title in args.plays if any(f"{cell}, {title}" not in rows for cell in presses)]
        if open_for:
            ask_kvpress(args.model, ((title, text(title)) for title in open_for), rows, args.shares, bar)
    print("\n" + "\n".join(kl_table(rows.rows)))


if __name__ == "__main__":
    main()
