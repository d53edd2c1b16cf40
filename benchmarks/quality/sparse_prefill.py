"""How much of the answer a sparse prefill changes: `python -m benchmarks.quality.sparse_prefill`.

    --model SmolLM2-135M-Instruct (default), or a folder or hub id     --tokens 4096     --chunk 8192     --last 512
    --cells means-16-16/top-p/head ...     way/rule/combine, see `block_choice.py`
    --cells spin/top-p/head                `SpinCache(model, prefill="sparse")` reads the prompt and decodes; needs --parameters
    --densities 0.3 0.2                    share of the causal blocks of 128 x 128 that are read
    --parameters 0.01 0.02                 of the rule, instead of densities
    --texts 2    --steps 128               plays, and real tokens behind each prompt
    --tasks passkey "one of six" ...       ask questions instead (`tasks.py`), `--examples` of each, prompts of `--tokens`

A prompt is read with block-sparse attention, in chunks, its last tokens with dense attention. Real tokens behind it are then
read densely over the KV cache that the prefill left. Exactly causal; the first block and the diagonal are always read.
`spin` is the package itself, with its own last tokens; the parameter is `prefill_top_p`. With 1 its KL is rounding.

    parameter    of the rule, such that the density is the given one on the dense states of the first text. Other texts take it.
    density      share of the causal blocks that were read in the sparse prefill, of query blocks before the last tokens
    lost mass    share of the softmax that falls on blocks that are not read, on dense states of the first text
    KL           of the next-token distribution against that behind an exact prefill, mean over steps, in nats

Finished rows are not measured again; `--again` starts anew. Writes `benchmarks/results/sparse-prefill-<model>.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AttentionInterface, AutoTokenizer, Cache, DynamicCache

from benchmarks.common.example_models import default_model, play
from benchmarks.common.record import RESULTS
from benchmarks.common.rows_file import Rows, command_line
from benchmarks.quality.answers import answer
from benchmarks.quality.block_choice import (
    BLOCK,
    WAYS,
    causal,
    choose,
    combine,
    parameter_for,
    scaled,
)
from benchmarks.quality.divergence import divergence
from benchmarks.quality.prefill import add_model_options, load_model
from benchmarks.quality.retrieval import NEW_TOKENS, PLAYS, ending, one_line
from benchmarks.quality.tasks import TASKS, example, prompt
from spin_hf import SpinCache, kernels
from spin_hf.kernels import BlockLists

CELLS = [
    "means-16-16/top-p/head", "antidiagonal-16/top-p/head", "sampled-16/top-p/head", "exact/top-p/head",
    "vertical-slash/top-p/head", "prism/top-p/head", "block-means/max/head", "means-16-16/top-p/mean",
    "means-16-16/mass/head",
]  # fmt: skip
ALL = "all/max/mean"
"""Everything is read, by the code that reads blocks: what its rounding alone changes."""
SPIN = "spin"
"""The way of cells whose prompts `SpinCache` reads."""


class BlockSparse:
    """An attention function of transformers that reads chosen blocks only, and all of them unless `cell` is set.

    Attributes:
        cell: way, rule, combine.
        parameter: of the rule.
        dense_from: position of the first query that reads everything.
        masses: of every way in `collect`, by layer and chunk.
        read, causal: blocks in the sparse part so far.
    """

    def __init__(self) -> None:
        self.cell: tuple[str, str, str] | None = None
        self.parameter, self.dense_from = 0.0, 0
        self.collect: list[str] = []
        self.masses: dict[str, list[Tensor]] = {}
        self.read = self.causal = 0

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """Attention of queries [1, heads, S, D] at the end of keys [1, H, T, D]; the output is [1, S, heads, D]."""
        scale = scaling or query.shape[-1] ** -0.5
        start = key.shape[2] - query.shape[2]
        rows = max(0, min(self.dense_from - start, query.shape[2])) // BLOCK * BLOCK
        stop = start + rows
        if rows and self.collect:
            states = scaled(query[:, :, :rows], key[:, :, :stop], scale)
            for way in self.collect:
                self.masses.setdefault(way, []).append(WAYS[way](*states, start))
        if not rows or self.cell is None:
            return _dense(query, key, value, scale).transpose(1, 2), None
        made = self._sparse(query[:, :, :rows], key[:, :, :stop], value[:, :, :stop], scale)
        rest = [_dense(query[:, :, rows:], key, value, scale)] if rows < query.shape[2] else []
        return torch.cat([made, *rest], 2).transpose(1, 2), None

    def _sparse(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        assert self.cell is not None
        way, rule, per = self.cell
        states, keys = scaled(query, key, scale)
        start = key.shape[2] - query.shape[2]
        if way == "all":
            chosen = causal(query.shape[2] // BLOCK, key.shape[2] // BLOCK).expand(key.shape[1], -1, -1)
        else:
            chosen = choose(combine(WAYS[way](states, keys, start), per), rule, self.parameter)
        self.read += int(chosen.sum())
        self.causal += int(causal(*chosen.shape[1:]).sum()) * chosen.shape[0]
        share = query.shape[1] // chosen.shape[0]  # query heads that read the same blocks
        out = torch.empty_like(query)
        blocks = key[0].unflatten(1, (-1, BLOCK)), value[0].unflatten(1, (-1, BLOCK))
        future = torch.zeros(BLOCK, BLOCK, dtype=query.dtype)
        future.masked_fill_(torch.ones(BLOCK, BLOCK, dtype=torch.bool).triu(1), float("-inf"))
        for head, i in product(*map(range, chosen.shape[:2])):
            kv = head * share // (query.shape[1] // key.shape[1])
            index = chosen[head, i].nonzero()[:, 0]
            part = [states[kv][index].flatten(0, 1) for states in blocks]
            bias = torch.zeros(BLOCK, part[0].shape[0], dtype=query.dtype)
            bias[:, -BLOCK:] = future
            heads, tokens = slice(head * share, (head + 1) * share), slice(i * BLOCK, (i + 1) * BLOCK)
            out[0, heads, tokens] = torch.nn.functional.scaled_dot_product_attention(
                query[:, heads, tokens].flatten(1, 2)[:, None], part[0][None, None], part[1][None, None],
                attn_mask=bias.repeat(share, 1), scale=scale,
            )[0, 0].unflatten(0, (share, BLOCK))  # fmt: skip
        return out


def _dense(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of queries at the end of the keys."""
    start = key.shape[2] - query.shape[2]
    mask = torch.arange(key.shape[2]) <= start + torch.arange(query.shape[2])[:, None] if start else None
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )


class Reader:
    """Reads prompts with one model.

    Args:
        model: of one sequence, on the CPU.
        chunk, last: tokens of a call; tokens at a prompt's end that are read densely.
    """

    def __init__(self, model: Any, chunk: int, last: int) -> None:
        self.model, self.chunk, self.last, self.attention = model, chunk, last, BlockSparse()
        AttentionInterface.register("block_sparse_prefill", self.attention)
        model.set_attn_implementation("block_sparse_prefill")

    @torch.no_grad()
    def read(self, ids: list[int], cell: str | None, parameter: float = 0.0) -> tuple[Cache, Tensor, float]:
        """The cache, the last logits [vocabulary] and the density of a prompt."""
        attention, parsed = self.attention, parse(cell)
        if parsed is not None and parsed[0] == SPIN:
            return self._read_by_spin(ids, parameter)
        attention.cell, attention.parameter = parsed, parameter
        attention.read = attention.causal = 0
        attention.dense_from = len(ids) - self.last
        cache = DynamicCache(config=self.model.config)
        for start in range(0, len(ids), self.chunk):
            part = torch.tensor([ids[start : start + self.chunk]])
            logits = self.model(part, past_key_values=cache, logits_to_keep=1).logits[0, -1]
        attention.cell, attention.dense_from, attention.collect = None, 0, []
        return cache, logits, attention.read / max(attention.causal, 1)

    def _read_by_spin(self, ids: list[int], top_p: float) -> tuple[Cache, Tensor, float]:
        """As `read`, by a `SpinCache` whose decoding attends to everything."""
        cache = SpinCache(
            self.model, budget=1 << 20, prefill="sparse", prefill_top_p=top_p, prefill_chunk_size=self.chunk
        )
        with counted_blocks() as counts:
            logits = self.model(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1).logits[0, -1]
        return cache, logits, counts["read"] / max(counts["causal"], 1)

    @torch.no_grad()
    def next_tokens(self, cache: Cache, logits: Tensor, ids: list[int]) -> Tensor:
        """Log-probabilities [steps, vocabulary] before each of `ids`, which the cache then holds but the last."""
        rest = self.model(torch.tensor([ids[:-1]]), past_key_values=cache).logits[0]
        return torch.cat((logits[None], rest)).float().log_softmax(-1)

    def parameters(self, ids: list[int], cells: list[str], densities: list[float]) -> dict[tuple[str, float], Any]:
        """The rule's parameter and the lost mass of each cell and density, on the dense states of a prompt."""
        split = {cell: parsed for cell in cells if (parsed := parse(cell)) is not None}
        self.attention.collect = sorted({"exact", *(parsed[0] for parsed in split.values())})
        self.read(ids, None)
        masses, self.attention.masses = self.attention.masses, {}
        found: dict[tuple[str, float], Any] = {}
        for cell, (way, rule, per) in split.items():
            rows = [combine(made, per) for made in masses[way]]
            truth = [combine(made, per)[0] for made in masses["exact"]]
            for density in densities:
                parameter = parameter_for(rows, rule, density)
                chosen = [choose(made, rule, parameter) for made in rows]
                pairs = zip(truth, chosen, strict=True)
                lost = torch.cat([made.masked_fill(read, 0.0).sum(-1).flatten() for made, read in pairs]).mean()
                found[cell, density] = parameter, round(float(lost), 4)
        return found


@contextmanager
def counted_blocks() -> Iterator[dict[str, int]]:
    """Counts of the blocks that `SpinCache` reads meanwhile, and of the causal ones, of query blocks that may skip some."""
    counts, original = {"read": 0, "causal": 0}, kernels.choose_blocks

    def counting(*args: Any) -> BlockLists:
        lists, (first, dense_from) = original(*args), args[4:]
        sparse = lists.counts[:, :, : max(0, dense_from - first)]
        counts["read"] += int(sparse.sum())
        own = first + torch.arange(sparse.shape[2], device=sparse.device)
        counts["causal"] += int((own + 1).sum()) * sparse.shape[0] * sparse.shape[1]
        return lists

    with mock.patch.object(kernels, "choose_blocks", counting):
        yield counts


def parse(cell: str | None) -> tuple[str, str, str] | None:
    """The parts of way/rule/combine, or None."""
    if cell is None:
        return None
    way, rule, per = cell.split("/")
    return way, rule, per


def settings(reader: Reader, ids: list[int], args: argparse.Namespace) -> list[tuple[str, str, float, float | None]]:
    """Name, cell, parameter and lost mass of every row; a prompt's dense states are needed for given densities."""
    if any(cell.startswith(f"{SPIN}/") for cell in args.cells) and not args.parameters:
        raise ValueError("--cells spin/...: expected --parameters, got densities; pass --parameters 0.9")
    if args.parameters:
        return [(f"{cell}, parameter {value:g}", cell, value, None) for cell in args.cells for value in args.parameters]
    found = reader.parameters(ids, args.cells, args.densities)
    return [
        (f"{cell} at {density:g}", cell, *found[cell, density]) for cell in args.cells for density in args.densities
    ]


def measure_kl(reader: Reader, tokenizer: Any, args: argparse.Namespace, rows: Rows) -> None:
    """Measure the rows that are missing."""
    texts = [tokenizer(play(name)).input_ids[: args.tokens + args.steps] for name in PLAYS[: args.texts]]
    if (shortest := min(map(len, texts))) < args.tokens + args.steps:
        raise ValueError(f"expected texts of {args.tokens + args.steps} tokens, got one of {shortest}; lower --tokens")
    runs = settings(reader, texts[0][: args.tokens], args)
    runs += [] if args.parameters else [(f"{ALL} at 1", ALL, 0.0, 0.0)]
    dense = [reader.next_tokens(*reader.read(ids[: args.tokens], None)[:2], ids[args.tokens :]) for ids in texts]
    for name, cell, parameter, lost in tqdm([run for run in runs if run[0] not in rows]):
        found, used = [], []
        for ids, truth in zip(texts, dense, strict=True):
            cache, logits, read = reader.read(ids[: args.tokens], cell, parameter)
            found.append(divergence(truth, reader.next_tokens(cache, logits, ids[args.tokens :])))
            used.append(read)
        kl = [one["kl"] for one in found]
        row = {
            "kl": round(sum(kl) / len(kl), 5), "kl_by_text": kl, "density": round(sum(used) / len(used), 4),
            "lost_mass": lost, "parameter": round(parameter, 6),
            "top1_agrees": round(sum(one["top1_agrees"] for one in found) / len(found), 4),
        }  # fmt: skip
        rows.put(name, row)
        tqdm.write(f"{name:40} {row}")


def measure_tasks(reader: Reader, tokenizer: Any, args: argparse.Namespace, rows: Rows) -> None:
    """Ask what is missing: an exact prefill, and every cell and density or parameter."""
    stop = ending(tokenizer)
    filler = play(PLAYS[0])
    asked = {(task, i): example(task, i) for i in range(args.examples) for task in args.tasks}
    prompts = {key: prompt(tokenizer, one, filler, args.tokens, key[1]) for key, one in asked.items()}
    runs = [
        ("exact prefill", None, 0.0),
        *(run[:3] for run in settings(reader, next(iter(prompts.values()))[:-1], args)),
    ]
    every = [(f"{task}, {i}: {name}", task, i, cell, value) for task, i in asked for name, cell, value in runs]
    for name, task, i, cell, parameter in tqdm([run for run in every if run[0] not in rows]):
        ids = prompts[task, i]
        cache, _, used = reader.read(ids[:-1], cell, parameter)
        text = one_line(tokenizer, answer(reader.model, ids[-1], cache, stop, NEW_TOKENS))
        rows.put(
            name,
            {"score": round(asked[task, i].score(text), 4), "answer": text, "density": round(used, 4) if cell else 1.0},
        )
        tqdm.write(f"{name:60} {rows[name]}")


def main() -> None:
    """Measure what is missing and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--cells", nargs="+", default=CELLS)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.3, 0.2])
    parser.add_argument("--parameters", type=float, nargs="+", help="of the rule, instead of densities")
    for name, default in {"tokens": 4096, "chunk": 8192, "last": 512, "texts": 2, "steps": 128, "examples": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="ask questions instead of measuring KL")
    parser.add_argument("--again", action="store_true", help="measure finished rows again")
    add_model_options(parser)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    folder = args.model or default_model()
    name = Path(folder).name
    kind = "sparse-prefill-tasks" if args.tasks else "sparse-prefill"
    about = {"model": name, "tokens": args.tokens, "chunk": args.chunk, "dense_tokens_at_the_end": args.last,
             "block": BLOCK, "dtype": args.dtype}  # fmt: skip
    about |= {"new_tokens": NEW_TOKENS} if args.tasks else {"texts": list(PLAYS[: args.texts]), "steps": args.steps}
    output = args.output or RESULTS / f"{kind}-{name}.json"
    rows = Rows(output, about, command_line("quality.sparse_prefill", args.model), args.again)
    reader = Reader(load_model(folder, args.dtype, args.device), args.chunk, args.last)
    measure = measure_tasks if args.tasks else measure_kl
    measure(reader, AutoTokenizer.from_pretrained(folder), args, rows)


if __name__ == "__main__":
    main()
