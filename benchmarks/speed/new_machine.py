"""What the first answer waits for on a machine without compiled kernels: `python -m benchmarks.speed.new_machine`.

    --shape llama-8b                 random weights, bf16, `generate`
    --tokens 131072 4096             prompts
    --batch 1 8                      sequences of each of these prompts
    --new 16                         new tokens
    --output FILE                    default: benchmarks/results/h200/new-machine-<shape>.json

For each prompt three processes in turn: `new` with an empty cache of kernels, `again` with what that one has compiled, and the
second answer of `again`, `warm`. What is waited for is the difference.

Of each: seconds to the first token; the slowest of the later ones, and which; all together. Of `new` also the kernels, and
libraries that launch them, that the main thread compiled, with the second in which that ended: behind the first token there
should be none. Others are compiled by other threads, or by processes for them; `waited_s` is how long the main thread waited.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.common.record import RESULTS
from benchmarks.common.rows_file import Rows, command_line
from benchmarks.common.shapes import SHAPES, build
from benchmarks.common.timing import wait_for_device
from benchmarks.speed.prefill import about
from spin_hf import SpinCache

_LINE = "measured: "
"""What a process writes before its numbers."""


class Times:
    """A streamer that notes when tokens come."""

    def __init__(self) -> None:
        self.at = [time.perf_counter()]

    def put(self, tokens: Any) -> None:
        """The prompt first, then each token."""
        self.at.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to write."""

    def summary(self) -> dict[str, Any]:
        """Seconds to the first token, of the slowest later one, and of all."""
        first = self.at[2] - self.at[0]
        later = [stop - start for start, stop in zip(self.at[2:], self.at[3:], strict=False)]
        slowest = max(range(len(later)), key=later.__getitem__)
        return {
            "first_token_s": round(first, 3), "slowest_later_s": round(later[slowest], 3), "slowest_later": slowest + 2,
            "median_later_ms": round(sorted(later)[len(later) // 2] * 1e3, 2), "all_s": round(self.at[-1] - self.at[0], 3),
        }  # fmt: skip


class Watch:
    """Notes what the main thread compiles and how long it waits for other threads."""

    def __init__(self) -> None:
        from triton import knobs
        from triton.runtime import build as libraries

        from spin_hf.kernels import compile_ahead
        from spin_hf.kernels.compile_process import CompilerProcesses

        self.began = time.perf_counter()
        self.compiled: list[list[Any]] = []
        self.elsewhere, self.by_processes, self.waited = 0, 0, 0.0
        original, wait, ask = libraries._build, compile_ahead.Compiles.wait, CompilerProcesses.compile

        def listen(*, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
            if not cache_hit:
                stages = [times.ir_initialization, *(each for _, each in times.lowering_stages), times.store_results]
                self._note(src.name, sum(stages) / 1e6)

        def built(name: str, *args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            made = original(name, *args, **options)
            self._note(name, time.perf_counter() - started)
            return made

        def waiting(compiles: Any) -> None:
            started = time.perf_counter()
            wait(compiles)
            self.waited += time.perf_counter() - started

        def asked(processes: Any, job: Any, waits: bool = True) -> bool:
            done = ask(processes, job, waits)
            self.by_processes += done
            return done

        CompilerProcesses.compile = asked  # type: ignore[method-assign]
        knobs.compilation.listener, libraries._build = listen, built
        compile_ahead.Compiles.wait = waiting  # type: ignore[method-assign]

    def _note(self, name: str, seconds: float) -> None:
        if threading.current_thread() is threading.main_thread():
            self.compiled.append([name, round(seconds, 2), round(time.perf_counter() - self.began, 2)])
        else:
            self.elsewhere += 1

    def summary(self) -> dict[str, Any]:
        """What was noted."""
        return {
            "waited_s": round(self.waited, 3), "compiled_by_other_threads": self.elsewhere,
            "compiled_by_processes": self.by_processes, "compiled_by_main_thread": self.compiled,
        }  # fmt: skip


def answers(model: Any, tokens: int, batch: int, new: int, number: int) -> list[dict[str, Any]]:
    """Times of so many answers of a process, one after the other, with a new cache each."""
    made = []
    for _ in range(number):
        ids = torch.randint(0, model.config.vocab_size, (batch, tokens), device=model.device)
        wait_for_device()
        watch, times = Watch(), Times()
        with torch.no_grad():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=SpinCache(model), max_new_tokens=new,
                min_new_tokens=new, do_sample=False, streamer=times,
            )  # fmt: skip
        made.append(times.summary() | watch.summary())
    return made


def in_new_process(shape: str, tokens: int, batch: int, new: int, number: int, cache: str) -> list[dict[str, Any]]:
    """As `answers`, in a process with this cache of kernels."""
    given = [shape, tokens, batch, new, number]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed.new_machine", "--process", json.dumps(given)],
        env=os.environ | {"TRITON_CACHE_DIR": cache}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(_LINE)]
    found: list[dict[str, Any]] = json.loads(line.removeprefix(_LINE))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[131072, 4096])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--process", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    if given.process:
        shape, *numbers = given.process
        print(_LINE + json.dumps(answers(build(shape), *numbers)))
        return
    output = given.output or RESULTS / "h200" / f"new-machine-{given.shape}.json"
    command = command_line("speed.new_machine", None).replace(f" --output {given.output}", "")
    rows = Rows(output, about(given.shape), command)
    for tokens, batch in zip(given.tokens, given.batch, strict=True):
        with tempfile.TemporaryDirectory() as cache:
            numbers = given.shape, tokens, batch, given.new
            (first,) = in_new_process(*numbers, 1, cache)
            again, warm = in_new_process(*numbers, 2, cache)
        waits = {"waits_s": round(first["all_s"] - warm["all_s"], 3)}
        made = {"tokens": tokens, "batch": batch, "new_tokens": given.new, **waits}
        rows.put(f"{batch} x {tokens}", made | {"new": first, "again": again, "warm": warm})
        print(json.dumps(rows[f"{batch} x {tokens}"], indent=1), flush=True)


if __name__ == "__main__":
    main()
