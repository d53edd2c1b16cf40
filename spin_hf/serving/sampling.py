"""The next token of each request, from the logits of a step.

    greedy, no processors            one argmax for all of them
    warpers with equal parameters    one call for all of them; each draws with its own generator
    others                           one call for each, with its ids

Random numbers come from the request's generator only, so tokens do not depend on the other requests. An exception in one
request's processors or criteria is that request's.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers.generation import logits_process

from .generation import Generation
from .row_errors import forget_frames

_WARPERS = tuple(
    getattr(logits_process, name)
    for name in (
        "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "TopHLogitsWarper", "MinPLogitsWarper",
        "TypicalLogitsWarper", "EpsilonLogitsWarper", "LogitNormalization",
    )
    if hasattr(logits_process, name)
)  # fmt: skip
"""Processors that read the scores of a row only."""
_PLAIN = (int, float, bool, str, type(None))


class Choice:
    """Chooses the tokens of one request.

    Args:
        generation: how.
        prompt: ids of the prompt.
        device: of the logits.
    """

    def __init__(self, generation: Generation, prompt: Sequence[int], device: torch.device) -> None:
        self.generation, self.device = generation, device
        self._prompt = prompt
        self._ids: Tensor | None = None
        self.group = _group(generation)
        """Requests of equal groups are chosen for in one call; None for a call of its own."""

    def ids(self, tokens: Sequence[int]) -> Tensor:
        """[1, n], int64: prompt and generated tokens."""
        held = 0 if self._ids is None else self._ids.shape[1]
        new = [*self._prompt, *tokens] if self._ids is None else tokens[held - len(self._prompt) :]
        if len(new):
            appended = torch.tensor([new], dtype=torch.int64, device=self.device)
            self._ids = appended if self._ids is None else torch.cat([self._ids, appended], 1)
        assert self._ids is not None
        return self._ids

    def reason(self, tokens: Sequence[int]) -> str | None:
        """Why the request ends with the last of its `tokens`; None if it goes on. Raises what a user's criterion raises."""
        found = self.generation.ends(len(self._prompt) + len(tokens), tokens[-1])
        if found != "stop" and self.generation.criteria:
            ids = self.ids(tokens)
            if any(bool(torch.as_tensor(criterion(ids, None)).all()) for criterion in self.generation.criteria):
                return "stop"
        return found


class Chosen:
    """The next token of each request, on its way from the device to the host.

    Args:
        number: of requests.
        found: places of requests, and their tokens on the device.
        errors: place -> what the request's processors raised.
    """

    def __init__(self, number: int, found: list[tuple[list[int], Tensor]], errors: dict[int, Exception]) -> None:
        self.number, self.errors = number, errors
        self._places = [place for places, _ in found for place in places]
        self._ids: Tensor | None = torch.cat([ids for _, ids in found]) if found else None
        self._copied: torch.cuda.Event | None = None
        self._on_host = self._ids
        if self._ids is not None and self._ids.device.type == "cuda":
            self._on_host = torch.empty(self._ids.shape, dtype=self._ids.dtype, pin_memory=True)
            self._on_host.copy_(self._ids, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(self._ids.device))

    def read(self) -> list[int | Exception]:
        """Tokens and errors in the order of the requests. Waits for the device, but not for what was launched later."""
        if self._copied is not None:
            self._copied.synchronize()
        values = [] if self._on_host is None else self._on_host.tolist()
        found: dict[int, int | Exception] = {**dict(zip(self._places, values, strict=True)), **self.errors}
        return [found[place] for place in range(self.number)]

    def ids_of(self, places: list[int]) -> Tensor | None:
        """[n], int64, on the device: the tokens of requests without errors."""
        if self._ids is None:
            return None
        if places == self._places:
            return self._ids
        order = [self._places.index(place) for place in places]
        return self._ids[torch.tensor(order, dtype=torch.int64).to(self._ids.device, non_blocking=True)]


def choose(
    choices: Sequence[Choice], tokens: Sequence[Sequence[int]], logits: Tensor, relieve: Callable[[], bool] = lambda: False
) -> Chosen:  # fmt: skip
    """The next token of each request, or what its processors raised. Does not wait for the device.

    Args:
        choices, tokens: of each request; the tokens generated so far, which only choices without a group read.
        logits: [n, vocabulary], float32.
        relieve: frees memory if there is none left to compute with. Returns whether to try again.
    """
    groups: dict[Hashable, list[int]] = {}
    for number, choice in enumerate(choices):
        groups.setdefault(("own", number) if choice.group is None else choice.group, []).append(number)
    errors: dict[int, Exception] = {}
    found: list[tuple[list[int], Tensor]] = []
    for members in groups.values():
        first = choices[members[0]]
        try:
            made = _again(partial(_best_or_probabilities, first, tokens[members[0]], members, logits), relieve)
            if first.generation.generator is None:
                found.append((members, made))
                continue
        except Exception as error:  # whatever the processors of a user raise ends these requests only
            errors |= dict.fromkeys(members, error)
            continue
        for place, number in enumerate(members):
            try:
                generator = choices[number].generation.generator
                one = made[place : place + 1]
                found.append(([number], _again(partial(torch.multinomial, one, 1, generator=generator), relieve)[0]))
            except RuntimeError as error:  # probabilities that are none
                errors[number] = error
    return Chosen(len(choices), found, errors)


def _best_or_probabilities(first: Choice, tokens: Sequence[int], members: list[int], logits: Tensor) -> Tensor:
    """Of requests that choose like `first`: the best ids [n], or if they sample, probabilities [n, vocabulary]."""
    rows = logits if len(members) == len(logits) else logits[members]
    ids = first.ids(tokens) if first.group is None else _no_ids(len(members), logits.device)
    scores = first.generation.processors(ids, rows) if len(first.generation.processors) else rows
    return scores.argmax(-1) if first.generation.generator is None else torch.softmax(scores, -1)


def _again(call: Callable[[], Tensor], relieve: Callable[[], bool]) -> Tensor:
    """`call()`, a second time if it runs out of memory and `relieve` can free some."""
    try:
        return call()
    except torch.OutOfMemoryError as error:
        forget_frames(error)
        if not relieve():
            raise
    return call()


def _no_ids(rows: int, device: torch.device) -> Tensor:
    """[rows, 0], for processors that read no ids."""
    return torch.empty((rows, 0), dtype=torch.int64, device=device)


def _group(generation: Generation) -> Hashable | None:
    """Equal for requests whose processors have equal parameters and read no ids; None for others."""
    parts: list[Hashable] = ["greedy" if generation.generator is None else "sampled"]
    for processor in generation.processors:
        if type(processor) not in _WARPERS:
            return None
        fields = vars(processor)
        if not all(isinstance(value, _PLAIN) for value in fields.values()):
            return None
        parts.append((type(processor), tuple(sorted(fields.items()))))
    return tuple(parts)
