"""Random schedules of a loop: requests that come, are cancelled, fail or are paused, in random order, against each one alone.

Pool       prompts of one model, and what `generate` with a SpinCache gives for each alone, greedy and sampled
Schedule   one random history of a loop over requests from the pool, without a thread
"""

from __future__ import annotations

import functools
import mmap
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from spin_hf import CapacityError, RequestLoop, SpinCache
from spin_hf.integration.prefill_hook import CACHE_NAME
from spin_hf.serving.reading import PromptReading
from spin_hf.serving.request import Request
from tests.support.zoo import random_tokens, subject_model

MOST_NEW = 16
LENGTHS = (1, 5, 33, 64, 130, 200, 270, 270, 270, 300)
PREFIX = 190
"""Tokens that the prompts of 270 tokens share."""
OPTIONS: dict[str, Any] = dict(budget=4096, method="shadowkv")
SAMPLING: dict[str, Any] = dict(do_sample=True, temperature=0.9, top_k=30, top_p=0.95)


def generated_alone(model: Any, prompt: list[int], options: dict[str, Any], **kwargs: Any) -> list[int]:
    """Tokens that `generate` gives for a prompt with a cache of its own."""
    ids = torch.tensor([prompt], device=model.device)
    cache = SpinCache(model, **options)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **{CACHE_NAME: cache}, **kwargs)
    return output[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


class Pool:
    """Prompts of one model, with their tokens alone.

    Args:
        family: of the model.
    """

    def __init__(self, family: str) -> None:
        self.model = subject_model(family)
        shared = random_tokens(1, PREFIX, seed=99)[0].tolist()
        self.prompts: list[list[int]] = []
        for number, length in enumerate(LENGTHS):
            own = random_tokens(1, length, seed=number)[0].tolist()
            self.prompts.append((shared + own)[:length] if length == 270 else own)
        self.expected: dict[tuple[int, int | None], list[int]] = {}

    def alone(self, number: int, seed: int | None) -> list[int]:
        """Tokens of a prompt alone; greedy if `seed` is None."""
        key = number, seed
        if key not in self.expected:
            sampling = {} if seed is None else SAMPLING
            torch.manual_seed(seed or 0)
            self.expected[key] = generated_alone(
                self.model, self.prompts[number], OPTIONS, max_new_tokens=MOST_NEW, **sampling
            )
        return self.expected[key]


@functools.cache
def pool(family: str) -> Pool:
    """The pool of a family, with what is known of it so far."""
    return Pool(family)


class FailsAt(LogitsProcessor):
    """Raises for the n-th token."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise ZeroDivisionError("a processor of the user")
        return scores


class Schedule:
    """A random history.

    Args:
        family: of the model.
        seed: which history.
        faults: whether steps and prompts run out of memory now and then.
    """

    def __init__(self, family: str, seed: int, faults: bool = True) -> None:
        self.random, self.faults = random.Random(seed), faults
        self.pool = pool(family)
        choose = self.random.choice
        options = dict(OPTIONS, method=choose(["shadowkv", "shadowkv", "fitted"]))
        if choose([False, False, True]):
            options["gpu_memory"] = choose(["300KB", "600KB", "1200KB", "4MB"])
        self.loop = RequestLoop(
            self.pool.model, max_rows=choose([1, 2, 3, 5]), max_slowdown=choose([None, 1.5, 4.0]),
            max_wait_s=choose([None, 0.0]), share_prefixes=choose([True, True, False]), **options,
        )  # fmt: skip
        self.scheduler = self.loop.scheduler
        self.scheduler.decoder.runs_ahead = choose([False, True, True])  # as on a GPU
        self.requests: list[tuple[Request, int, int | None, int, int | None]] = []
        """Request, its prompt's number, its seed, its number of tokens, and after how many it fails."""
        self.refused = 0
        self._inject()

    def run(self) -> None:
        """Run the history to its end and check every result."""
        arrivals = self.random.randint(2, 9)
        turns = 0
        while arrivals or self.scheduler.requests():
            if arrivals and self.random.random() < 0.4:
                arrivals -= 1
                self._submit()
            if self.requests and self.random.random() < 0.04:
                self.loop.worker.cancel(self.random.choice(self.requests)[0])
            self.scheduler.turn()
            turns += 1
            assert turns < 5000, f"no progress: {self.loop.stats()}"
        for entry in self.requests:
            self._check(*entry)
        assert not any(self.scheduler.batch.rows)
        assert self.scheduler.held() == []
        assert self.scheduler.idle() == []

    def _submit(self) -> None:
        choose = self.random.choice
        number, seed = self.random.randrange(len(LENGTHS)), choose([None, None, 1, 2])
        length = self.random.randint(1, MOST_NEW)
        fails = self.random.randint(0, length - 1) if self.random.random() < 0.1 else None
        kwargs: dict[str, Any] = dict(max_new_tokens=length, seed=seed, **({} if seed is None else SAMPLING))
        if fails is not None:
            kwargs["logits_processor"] = LogitsProcessorList([FailsAt(fails)])
        elif self.random.random() < 0.4:  # ends with a token, which the host learns late
            expected = self.pool.alone(number, seed)[:length]
            kwargs["eos_token_id"] = choose(expected)
            length = expected.index(kwargs["eos_token_id"]) + 1
        request = self.loop.unchecked(self.pool.prompts[number], **kwargs)
        try:
            self.loop.check(request)
        except CapacityError:
            self.refused += 1
            return
        self.requests.append((request, number, seed, length, fails))
        self.scheduler.waiting.append(request)

    def _check(self, request: Request, number: int, seed: int | None, length: int, fails: int | None) -> None:
        result = request.handle.outcome(0)
        expected = self.pool.alone(number, seed)[:length]
        what = f"prompt {number}, seed {seed}: {result.finish_reason}"
        assert result.tokens == expected[: len(result.tokens)], what
        if result.finish_reason == "cancelled":
            assert request.cancelled
        elif fails is not None:
            assert result.finish_reason == "error", what
            assert isinstance(result.error, ZeroDivisionError)
            assert len(result.tokens) == fails
        else:
            ended = result.tokens[-1] in request.choice.generation.end_tokens
            assert result.finish_reason == ("stop" if ended else "length"), f"{what}, {result.error!r}"
            assert result.tokens == expected, what

    def _inject(self) -> None:
        """Let steps and chunks fail now and then, before or after they ran."""
        if not self.faults:
            return
        step = self.scheduler.batch.step

        def failing(tokens: dict[int, int], ids: Tensor | None) -> Tensor:
            if len(tokens) > 1 and self.random.random() < 0.04:
                raise self.random.choice([torch.OutOfMemoryError("a step"), CapacityError("a step")])
            return step(tokens, ids)

        self.scheduler.batch.step = failing  # type: ignore[method-assign]
        start = self.scheduler.make_reading

        def reading(*arguments: Any) -> PromptReading:
            made = start(*arguments)
            read = made.read

            def failing_read(number: int) -> Tensor:
                if self.scheduler.running and self.random.random() < 0.06:
                    raise torch.OutOfMemoryError("a chunk")
                return read(number)

            made.read = failing_read  # type: ignore[method-assign]
            return made

        self.scheduler.make_reading = reading  # type: ignore[assignment]


def resident_bytes() -> int:
    """Memory of this process, as the system says."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
