"""NVIDIA's kvpress as a rival: its own environment (`python -m benchmarks.quality.kvpress_rivals` builds it),
and questions to it.

kvpress pins an older transformers, so it runs in a process of its own (`kvpress_worker.py`, which says what each press sees),
from an environment that is built once under `~/.cache/spin_hf/` (or `$SPIN_HF_CACHE`). `quality.py --kvpress` and
`retrieval.py --kvpress` send it the token ids that all methods get, and how many tokens each press is to keep per KV head: as
many as SpinCache with `shadowkv` attends to at the same budget.

    case    a prompt and what follows; made by `case`
    reply   a line of JSON for each press; read by `parse`, as soon as it comes
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common.example_models import build_once

WORKER = Path(__file__).resolve().parent / "kvpress_worker.py"
REQUIREMENTS = ("torch==2.13.0", "kvpress==0.5.5", "transformers==5.2.0")
"""torch first, by itself: pip then does not choose a newer and larger one."""
VERSION = ", ".join(REQUIREMENTS[1:])
PRESSES = ("snapkv", "snapkv8", "knorm", "tova", "streamingllm", "decoding knorm", "decoding tova")
UNSEEN = ("snapkv unseen",)
"""Presses of prompts that end in a question: they compress what stands before it."""


class ExchangeError(Exception):
    """The kvpress worker ended early, or its reply does not match the request."""


def _build(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    for requirements in (REQUIREMENTS[:1], REQUIREMENTS):
        print(f"installing {' '.join(requirements)} for kvpress (once)", file=sys.stderr)
        command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *requirements]
        subprocess.run(command, check=True)


def environment() -> Path:
    """The interpreter of kvpress's environment, which is built if it is not there."""
    return build_once("-".join(word.replace("==", "-") for word in REQUIREMENTS), _build) / "bin" / "python"


def cell(press: str, share: int) -> str:
    """The name of a press's row: `kvpress snapkv, 1/64`."""
    return f"kvpress {press}, 1/{share}"


def case(key: str, ids: list[int], context: int, kept: dict[tuple[str, int], int], **task: Any) -> dict[str, Any]:
    """A prompt for presses.

    Args:
        key: its name.
        ids: the prompt.
        context: how many of them stand before the question; all, where there is none.
        kept: for each press and share, how many tokens to keep per KV head.
        task: `following` and `dense`, or `new_tokens` and `stop` (see the worker).
    """
    presses = [{"cell": cell(press, share), "press": press, "kept": number} for (press, share), number in kept.items()]
    return {"key": key, "ids": ids, "context": context, "presses": presses, **task}


def parse(line: str, asked: dict[str, dict[str, Any]]) -> tuple[str, str, dict[str, Any]]:
    """Key, cell and the rest of a reply to one of the cases `asked`, by their keys.

    Raises:
        ExchangeError: it is not a reply to one of them.
    """
    try:
        reply = json.loads(line)
        key, name = reply.pop("case"), reply.pop("cell")
        (press,) = [one for one in asked[key]["presses"] if one["cell"] == name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExchangeError(f"expected a reply to one of {sorted(asked)}, got {line!r}") from error
    wanted = (
        {"attended_tokens", "tokens"} if "stop" in asked[key] else {"attended_tokens", "kl", "kl_p90", "top1_agrees"}
    )
    if set(reply) != wanted or reply["attended_tokens"] < press["kept"]:
        raise ExchangeError(f"expected {sorted(wanted)} and at least {press['kept']} tokens attended to, got {line!r}")
    return key, name, reply


def ask(model: str, cases: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Key, cell and reply of every press of the cases, as they come.

    Args:
        model: folder or hub id.
    Raises:
        ExchangeError: the worker ended early, or a reply does not match the request.
    """
    asked = {one["key"]: one for one in cases}
    if not asked:
        return
    with tempfile.TemporaryDirectory() as scratch:
        job = Path(scratch) / "job.json"
        job.write_text(json.dumps({"model": model, "cases": list(asked.values())}))
        command = [str(environment()), str(WORKER), str(job)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None
            try:
                for line in worker.stdout:
                    yield parse(line, asked)
            except BaseException:
                worker.kill()
                raise
        if worker.returncode:
            raise ExchangeError(f"kvpress's process ended with status {worker.returncode}; its message stands above")


if __name__ == "__main__":
    print(environment())
