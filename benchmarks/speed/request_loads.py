"""Loads of requests, and what a dense system would make of them, from times that were measured. Nothing here needs a GPU.

    Load        name, requests: when each arrives, tokens of its prompt, tokens that it generates
    DenseTimes  seconds of a prompt and of a step of dense attention, and the tokens that GPU memory holds
    simulate    arrivals -> first tokens and ends, of dense batches: static ones, or requests that join and leave

A dense system with continuous batching reads each prompt as soon as its keys and values fit, and then goes on decoding.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

K = 1024
MEAN_OUTPUT, MOST_OUTPUT = 256, 1024
MIXED = (8 * K, 16 * K, 32 * K, 64 * K)
POISSON = {"poisson-50": 0.5, "poisson-80": 0.8, "poisson-95": 0.95, "poisson-200": 2.0}
"""Arrivals as a share of what the dense system can do."""
LOADS = ("burst-32k", "burst-128k", *POISSON, "short", "questions")
DOCUMENT, QUESTION, ANSWER = 64 * K, 64, 64


@dataclass(frozen=True)
class Arrival:
    """One request.

    Attributes:
        at: seconds after the first one.
        prompt, output: tokens.
        shared: of the prompt, tokens that all requests of the load begin with.
    """

    at: float
    prompt: int
    output: int
    shared: int = 0


@dataclass(frozen=True)
class DenseTimes:
    """Measured times of dense attention: linear in what a step reads, a prompt linear and quadratic in its tokens.

    Attributes:
        step_s, step_token_s: of a step, and of a token that it reads.
        prompt_token_s, prompt_pair_s: of a token of a prompt, and of a pair of them.
        room_tokens: tokens of keys and values that GPU memory holds.
    """

    step_s: float
    step_token_s: float
    prompt_token_s: float
    prompt_pair_s: float
    room_tokens: int

    def step(self, tokens: int) -> float:
        """Seconds of a step that reads `tokens` tokens."""
        return self.step_s + tokens * self.step_token_s

    def prompt(self, tokens: int) -> float:
        """Seconds of reading a prompt."""
        return tokens * self.prompt_token_s + tokens * tokens * self.prompt_pair_s


def outputs(number: int, seed: int, mean: int = MEAN_OUTPUT) -> list[int]:
    """Lengths of outputs, exponential."""
    draw = random.Random(seed)
    return [max(2, min(MOST_OUTPUT, round(draw.expovariate(1 / mean)))) for _ in range(number)]


def burst(number: int, prompt: int, seed: int = 0) -> list[Arrival]:
    """Requests that arrive at once."""
    return [Arrival(0.0, prompt, output) for output in outputs(number, seed)]


def poisson(rate: float, seconds: float, seed: int = 0) -> list[Arrival]:
    """Requests of mixed lengths, `rate` a second, for so many seconds; one at least."""
    draw, made, now = random.Random(seed), list[Arrival](), 0.0
    lengths = outputs(4096, seed + 1)
    while not made or now < seconds:
        made.append(Arrival(now, draw.choice(MIXED), lengths[len(made) % len(lengths)]))
        now += draw.expovariate(rate)
    return made


def load(name: str, scale: float, dense: DenseTimes | None, seconds: float) -> list[Arrival]:
    """The requests of a load.

    Args:
        scale: of the number of requests.
        dense: for arrivals that are a share of what it can do.
        seconds: of arrivals.
    """

    def scaled(number: int) -> int:
        return max(2, round(number * scale))

    if name == "burst-32k":
        return burst(scaled(64), 32 * K)
    if name == "burst-128k":
        return burst(scaled(16), 128 * K)
    if name == "short":
        draw = random.Random(5)
        return [Arrival(0.0, draw.randint(64, 2 * K), each) for each in outputs(scaled(200), 6)]
    if name == "questions":
        return [Arrival(0.0, DOCUMENT + QUESTION, ANSWER, DOCUMENT) for _ in range(scaled(100))]
    assert dense is not None
    return poisson(POISSON[name] * capacity(dense), seconds)


def capacity(dense: DenseTimes) -> float:
    """Requests of mixed lengths a second that the dense system ends when there are always more."""
    made = [replace(each, at=0.0) for each in poisson(1.0, 200)]
    ends = simulate(made, dense)
    return len(made) / max(end for _, end, _ in ends)


def simulate(
    arrivals: Sequence[Arrival], dense: DenseTimes, static_batch: int | None = None
) -> list[tuple[float, float, int]]:
    """First token, end (seconds after the first arrival) and output of each request, in their order.

    Args:
        static_batch: sequences of a batch that runs until its longest output ends; None for requests that join and leave.
    """
    if static_batch is not None:
        return _static(arrivals, dense, static_batch)
    now, waiting = 0.0, sorted(range(len(arrivals)), key=lambda index: arrivals[index].at)
    running: dict[int, int] = {}
    firsts, ends = [0.0] * len(arrivals), [0.0] * len(arrivals)
    while waiting or running:
        held = sum(arrivals[index].prompt + arrivals[index].output for index in running)
        if waiting:
            head = arrivals[waiting[0]]
            if not running:
                now = max(now, head.at)
            fits = held + head.prompt + head.output <= dense.room_tokens or not running
            if head.at <= now and fits:
                index = waiting.pop(0)
                now += dense.prompt(head.prompt)
                firsts[index], running[index] = now, head.output - 1
                ends[index] = now
                running = {each: left for each, left in running.items() if left > 0}
                continue
        now += dense.step(sum(arrivals[i].prompt + arrivals[i].output - left for i, left in running.items()))
        for index in list(running):
            running[index] -= 1
            if not running[index]:
                ends[index] = now
                del running[index]
    return [(first, end, each.output) for first, end, each in zip(firsts, ends, arrivals, strict=True)]


def _static(arrivals: Sequence[Arrival], dense: DenseTimes, batch: int) -> list[tuple[float, float, int]]:
    made, now = list[tuple[float, float, int]](), 0.0
    for start in range(0, len(arrivals), batch):
        together = arrivals[start : start + batch]
        now = max(now, *(each.at for each in together)) + sum(dense.prompt(each.prompt) for each in together)
        first, longest = now, max(each.output for each in together)
        width = max(each.prompt for each in together)
        ends = []
        for step in range(1, longest):
            now += dense.step(len(together) * (width + step))
            ends.append(now)
        made += [(first, ends[each.output - 2] if each.output > 1 else first, each.output) for each in together]
    return made


def best_static(arrivals: Sequence[Arrival], dense: DenseTimes) -> int:
    """The largest static batch whose keys and values GPU memory holds."""
    widest = max(each.prompt + each.output for each in arrivals)
    return max(1, min(len(arrivals), dense.room_tokens // widest))


def figures(arrivals: Sequence[Arrival], times: Sequence[tuple[float, float, int]]) -> dict[str, Any]:
    """What a row tells of a load: seconds, tokens a second, TTFT and time per token.

    Args:
        times: first token, end and tokens of each request.
    """
    seconds = max(end for _, end, _ in times)
    ttft = sorted(first - each.at for each, (first, _, _) in zip(arrivals, times, strict=True))
    tpot = sorted((end - first) / (number - 1) * 1e3 for first, end, number in times if number > 1)
    generated = sum(number for _, _, number in times)
    return {
        "seconds": round(seconds, 2), "requests": len(times), "generated": generated,
        "tokens_per_s": round(generated / seconds, 1), "ttft_p50_s": round(statistics.median(ttft), 3),
        "ttft_p95_s": round(ttft[min(len(ttft) - 1, int(0.95 * len(ttft)))], 3),
        "tpot_p50_ms": round(statistics.median(tpot), 2) if tpot else None,
    }  # fmt: skip
