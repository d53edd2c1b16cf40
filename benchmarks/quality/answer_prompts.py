"""Answers to stored prompts, densely and by methods and budgets: `python -m benchmarks.quality.answer_prompts FILE ...`.

    --model FOLDER or hub id     --device cpu (default) cuda     --dtype bfloat16 (default) float16 float32
    --cells fitted/64 fitted/16 (default)     methods with budgets of 1/64 and 1/16 of the prompts' length
    --rope-scaling yarn:4                     for prompts longer than the model was trained on
    --workers 1                  processes, each with the model; several share one GPU
    --seconds 190 390            from the start of the command, for each file: then drop its examples that are not finished
    --examples N                 of each task, at most

Files of prompts come from `ruler.py`, `records.py` and `documents.py`. Every prompt is answered as `answers.py` describes. In
each file, example 0 of all tasks comes first, then example 1, and so on. An example is recorded once all its answers are there,
so a run that ends early has compared all methods on the same examples. A run goes on where another ended, unless `--again` is
given.

Files are answered one after the other: caches of one length use each other's CUDA graphs.

Writes `<kind>-<length>k-<model>.json` into `--output` (default: `benchmarks/results`) and prints tables of mean scores.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.common.record import RESULTS
from benchmarks.common.rows_file import Rows, command_line
from benchmarks.quality.answers import ask, end_of_turn, name_of
from benchmarks.quality.prefill import add_model_options, add_rope_option, load_model, rope_about
from benchmarks.quality.prompt_files import PromptFile, StoredPrompt
from benchmarks.quality.quality_tables import task_table
from benchmarks.quality.run_options import about_rows

Cell = tuple[str, int]


@dataclass(frozen=True)
class Job:
    """An example that is to be answered.

    Attributes:
        file: number of its file of prompts.
        length: of that file's prompts.
        cells: to answer beside dense attention.
        deadline: of `time.monotonic`, which all processes of a machine share.
        held: answers that are known.
    """

    file: int
    prompt: StoredPrompt
    length: int
    cells: list[Cell]
    deadline: float
    held: dict[str, Any] = field(default_factory=dict)


class Answerer:
    """A model that answers jobs.

    Args:
        options: model, dtype, device and rope scaling of `load_model`.
        threads: of the CPU; 0 for torch's default.
    """

    def __init__(self, options: tuple[Any, ...], threads: int = 0) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.model, self.tokenizer = load_model(*options), AutoTokenizer.from_pretrained(options[0])
        self.stop = end_of_turn(self.model, self.tokenizer)

    def __call__(self, job: Job) -> dict[str, Any] | None:
        """All answers of an example by their cells, or None if the time is over before the last of them."""
        if time.monotonic() > job.deadline:
            return None
        gc.collect()  # caches of the example before
        held = dict(job.held)
        for _ in ask(self.model, lambda: job.prompt.question(self.tokenizer, self.stop, job.length), job.cells, held):
            if time.monotonic() > job.deadline:
                break
        return held if all(name in held for name in names_of(job.cells)) else None


_of_process: list[Answerer] = []
_MOST_SECONDS = 600.0
"""How long a process whose GPU fails holds a job back."""


def _start(options: tuple[Any, ...], threads: int) -> None:
    _of_process[:] = [Answerer(options, threads)]


def _answer(job: Job) -> dict[str, Any] | None:
    try:
        return _of_process[0](job)
    except Exception:
        if not _gpu_works():  # and never will in this process: let others have the jobs
            time.sleep(max(0.0, min(job.deadline - time.monotonic(), _MOST_SECONDS)))
        raise


def _gpu_works() -> bool:
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def names_of(cells: list[Cell]) -> list[str]:
    """The names of all answers of an example."""
    return ["dense", *map(name_of, cells)]


def answered(jobs: list[Job], options: tuple[Any, ...], workers: int) -> Iterator[tuple[Job, Any]]:
    """Jobs, as they are finished, with their answers, None, or the error that stopped them.

    Raises:
        BrokenProcessPool: a process ended by itself.
    """
    if workers == 1:
        answerer = Answerer(options)
        yield from ((job, answerer(job)) for job in jobs)
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(workers, get_context("spawn"), _start, (options, threads)) as pool:
        futures = {pool.submit(_answer, job): job for job in jobs}
        for future in as_completed(futures):
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                raise error
            yield futures.pop(future), error or future.result()


def jobs_of(
    files: list[PromptFile], rows: list[Rows], cells: list[Cell], deadlines: list[float], examples: int | None
) -> list[Job]:
    """What is not answered yet, file by file and example by example."""
    found = [
        Job(number, prompt, file.tokens, cells, deadlines[number], rows[number].rows.get(prompt.name, {}))
        for number, file in enumerate(files) for prompt in file.prompts if examples is None or prompt.index < examples
    ]  # fmt: skip
    missing = [job for job in found if any(name not in job.held for name in names_of(cells))]
    return sorted(missing, key=lambda job: (job.file, job.prompt.index))


def cell_of(text: str) -> Cell:
    """The method and share of `fitted/64`.

    Raises:
        argparse.ArgumentTypeError: it is not of this form.
    """
    method, _, share = text.partition("/")
    if not method or not share.isdecimal() or not int(share):
        raise argparse.ArgumentTypeError(f"expected a method and a share such as fitted/64, got {text!r}")
    return method, int(share)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, with seconds for each file. Exits unless `shadowkv` stands before `oracle` and `window`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="of prompts")
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--cells", type=cell_of, nargs="+", default=[("fitted", 64), ("fitted", 16)])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, nargs="+", default=[math.inf])
    parser.add_argument("--examples", type=int)
    parser.add_argument("--again", action="store_true", help="answer finished examples again")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of results")
    add_model_options(parser)
    add_rope_option(parser)
    args = parser.parse_args(arguments)
    if len(args.seconds) == 1:
        args.seconds *= len(args.files)
    if len(args.seconds) != len(args.files):
        parser.error(f"--seconds: expected 1 or {len(args.files)} numbers, got {len(args.seconds)}")
    for place, (method, share) in enumerate(args.cells):
        if method in ("oracle", "window") and ("shadowkv", share) not in args.cells[:place]:
            parser.error(f"--cells: expected shadowkv/{share} before {method}/{share}, which gets as many tokens")
    return args


def opened(args: argparse.Namespace, file: PromptFile) -> Rows:
    """The results file of a file of prompts."""
    command = command_line("quality.answer_prompts", args.model, str(args.output), *map(str, args.files))
    about = about_rows(args, file.tokens, new_tokens="of each task", prompts=file.source, **rope_about(args))
    return Rows(args.output / f"{file.label}-{Path(args.model).name}.json", about, command, args.again)


def main() -> None:
    """Answer what is missing, write JSON, print tables. Exits with status 1 if an example failed."""
    began, args = time.monotonic(), parse()
    files = [PromptFile.read(file) for file in args.files]
    rows = [opened(args, file) for file in files]
    jobs = jobs_of(files, rows, args.cells, [began + seconds for seconds in args.seconds], args.examples)
    failed = dropped = 0
    options = (args.model, args.dtype, args.device, args.rope_scaling)
    for job, found in tqdm(answered(jobs, options, args.workers), total=len(jobs), unit=" examples"):
        if isinstance(found, BaseException):
            failed += 1
            said = repr(found) if failed > 1 else "".join(traceback.format_exception(found))
            print(f"{files[job.file].label}, {job.prompt.name}: {said}", file=sys.stderr)
        elif found is None:
            dropped += 1
        else:
            rows[job.file].put(job.prompt.name, found, [prompt.name for prompt in files[job.file].prompts])
    print(
        f"{len(jobs) - failed - dropped} examples answered in {time.monotonic() - began:.0f} s, {dropped} not, {failed} failed"
    )
    for file, of_file in zip(files, rows, strict=True):
        print(f"\n{file.label}\n\n" + "\n".join(task_table(of_file.rows)))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
