"""`generate_batch`: many prompts at once, results in their order. A `RequestLoop` for one call."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import fields
from os import PathLike
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from ..attention.methods.base import Method
from ..config import SpinOptions, require_count
from ..errors import CapacityError, OptionError, OptionTypeError
from ..persistence.prompt_store import PromptStore
from .events import EventLog
from .loop import MAX_ROWS, RequestLoop
from .progress import RequestBar
from .request import Request
from .results import RequestResult

logger = logging.getLogger("spin_hf")

_CACHE_OPTIONS = {field.name for field in fields(SpinOptions)} - {"tuning", "budget", "gpu_memory"}
_LOOK_S = 0.2
"""Seconds between two looks at the loop, for the bar."""


def generate_batch(
    model: PreTrainedModel, inputs: Iterable[Any], generation_config: GenerationConfig | None = None, *,
    tokenizer: Any = None, method: str | Method = "fitted", budget: int | float = 2048, gpu_memory: int | str = "auto",
    store: PromptStore | None = None, progress: bool = True, max_rows: int = MAX_ROWS, max_slowdown: float | None = None,
    seed: int | Sequence[int] | None = None, logits_processor: Any = None, stopping_criteria: Any = None,
    stop_strings: Any = None, events: EventLog | str | PathLike[str] | None = None, **kwargs: Any,
) -> list[RequestResult]:  # fmt: skip
    """Generate for many prompts, which join and leave a running batch.

    Ctrl-C returns what there is: requests that had not ended are "cancelled", with their tokens so far. A second Ctrl-C while
    these end raises KeyboardInterrupt.

    Args:
        model: a causal language model.
        inputs: prompts, each as token ids (a list or a tensor [n]), a text, or a chat (a list of messages).
        generation_config, logits_processor, stopping_criteria, stop_strings: as for `RequestLoop.submit`, for every prompt.
        tokenizer, method, budget, gpu_memory, store, max_rows, events: as for `RequestLoop`.
        progress: whether to show a bar, on a terminal or in a notebook.
        max_slowdown: as for `RequestLoop`. None reads prompts first, which gives the most tokens per second.
        seed: of the first prompt, the next has `seed + 1`; or one for each result. None draws them from torch's global
            generator.
        kwargs: other options of `SpinCache`, and arguments of `generate`. With `num_return_sequences=n` each prompt gives n
            results side by side, and is read once.
    Returns:
        A result for each prompt, in their order. A request that failed, or that can never fit the memory, has the finish reason
        "error" and its exception.
    Raises:
        OptionTypeError, OptionError, ValueError: an argument or a prompt is wrong. Nothing has run.
    """
    prompts = _listed(inputs)
    options = {name: kwargs.pop(name) for name in _CACHE_OPTIONS & kwargs.keys()}
    copies = _copies(kwargs, generation_config)
    if copies > 1:
        generation_config = _single(generation_config)
    prompts = [prompt for prompt in prompts for _ in range(copies)]
    seeds = _seeds(seed, len(prompts))
    loop = RequestLoop(
        model, method, budget=budget, gpu_memory=gpu_memory, store=store, tokenizer=tokenizer, max_rows=max_rows,
        max_slowdown=max_slowdown, max_wait_s=None, events=events, **options,
    )  # fmt: skip
    made = dict(
        kwargs, logits_processor=logits_processor, stopping_criteria=stopping_criteria, stop_strings=stop_strings
    )
    try:
        requests = [
            _prepared(loop, prompt, generation_config, each, made) for prompt, each in zip(prompts, seeds, strict=True)
        ]
        _run(loop, requests, progress)
    finally:
        loop.close(cancel=True)
    return [request if isinstance(request, RequestResult) else request.handle.outcome() for request in requests]


def _run(loop: RequestLoop, requests: list[Request | RequestResult], progress: bool) -> None:
    """Run requests to their ends. Ctrl-C cancels them."""
    queued = [request for request in requests if isinstance(request, Request)]
    with RequestBar(len(queued), progress) as bar:
        try:
            loop.enqueue(queued)
            _wait(loop, queued, bar)
        except KeyboardInterrupt:
            left = sum(not request.handle.done for request in queued)
            logger.warning("interrupted: %d of %d requests are cancelled, the others are returned", left, len(requests))
            loop.cancel_all()
            for request in queued:
                if request.cancelled or request.handle.done:
                    continue
                request.end("cancelled")  # it was not queued yet
            _wait(loop, queued, bar)


def _wait(loop: RequestLoop, requests: list[Request], bar: RequestBar) -> None:
    for request in requests:
        while not request.handle.wait(_LOOK_S):
            bar.update(loop.stats())
    bar.update(loop.stats())


def _prepared(
    loop: RequestLoop, prompt: Any, config: GenerationConfig | None, seed: int | None, made: dict[str, Any]
) -> Request | RequestResult:
    """A request, or the result of one that can never fit."""
    request = loop.unchecked(prompt, config, seed=seed, **made)
    try:
        loop.check(request)
    except CapacityError as error:
        logger.warning("request %d cannot run: %s", request.number, error)
        request.end("error", error)
        return request.handle.outcome()
    return request


def _listed(inputs: Any) -> list[Any]:
    if isinstance(inputs, (str, bytes, dict)) or not isinstance(inputs, Iterable):
        raise OptionTypeError(
            f"inputs: expected a list of prompts, got {type(inputs).__name__}; pass [prompt] for one of them"
        )
    prompts = list(inputs)
    if prompts and isinstance(prompts[0], int):
        raise OptionTypeError("inputs: expected a list of prompts, got one of token ids; pass [ids] for one of them")
    return prompts


def _copies(kwargs: dict[str, Any], config: GenerationConfig | None) -> int:
    given = kwargs.pop("num_return_sequences", None)
    given = getattr(config, "num_return_sequences", None) if given is None else given
    return 1 if given is None else require_count("num_return_sequences", given, 1, example=4)


def _single(config: GenerationConfig | None) -> GenerationConfig | None:
    if config is None:
        return None
    return GenerationConfig.from_dict({**config.to_dict(), "num_return_sequences": 1})


def _seeds(seed: int | Sequence[int] | None, number: int) -> list[int | None]:
    if seed is None:
        return [None] * number
    if isinstance(seed, Sequence):
        if len(seed) != number:
            raise OptionError(
                f"seed: expected one for each of {number} results, got {len(seed)}; pass an int, or as many"
            )
        return list(seed)
    return [require_count("seed", seed, 0, example=0) + index for index in range(number)]
