"""Options of `quality.py` and `retrieval.py`, and what all rows of a file have in common."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.common.example_models import default_model
from benchmarks.common.record import RESULTS, fingerprint
from benchmarks.common.rows_file import Rows, command_line
from benchmarks.quality import kvpress_rivals
from benchmarks.quality.chosen_tokens import RECENT, SINKS
from benchmarks.quality.prefill import add_model_options
from spin_hf import __version__


def parser(description: str | None, methods: list[str], tokens: int) -> argparse.ArgumentParser:
    """The options that both have, with their defaults."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", help="folder or hub id (default: SmolLM2-135M-Instruct)")
    made.add_argument("--methods", nargs="+", default=methods)
    made.add_argument("--kvpress", action="store_true", help="kvpress too, in an environment of its own")
    made.add_argument("--shares", type=int, nargs="+", default=[64, 32, 16, 8], help="budgets: 1/share of the context")
    made.add_argument("--tokens", type=int, default=tokens)
    made.add_argument("--again", action="store_true", help="measure finished rows again")
    add_model_options(made)
    made.add_argument("--output", type=Path)
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line. Exits unless shadowkv is measured first; `model` is set."""
    args = made.parse_args()
    if args.methods[0] != "shadowkv":
        made.error("--methods: expected shadowkv first, as others get as many tokens as it attends to")
    args.given_model, args.model = args.model, args.model or default_model()
    return args


def about_rows(args: argparse.Namespace, tokens: int, **about: Any) -> dict[str, Any]:
    """What all rows of a results file have in common, with `about` behind model and tokens."""
    gpu = {"gpu": torch.cuda.get_device_name()} if args.device.startswith("cuda") else {}
    return {
        "model": Path(args.model).name, "tokens": tokens, **about, "dtype": args.dtype, "device": args.device, **gpu,
        "machine": platform.machine(), "num_sink_tokens": SINKS, "recent_window": RECENT, "sources": fingerprint(),
        "versions": {"spin_hf": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
                     "kvpress": kvpress_rivals.VERSION},
    }  # fmt: skip


def open_rows(kind: str, args: argparse.Namespace, **about: Any) -> Rows:
    """The results file of a `kind` such as `quality`; `about` is added to what all its rows have in common."""
    output = args.output or RESULTS / f"{kind}-{Path(args.model).name}.json"
    command = command_line(f"quality.{kind}", args.given_model)
    return Rows(output, about_rows(args, args.tokens, **about), command, args.again)
