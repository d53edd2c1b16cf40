"""What happened in a loop, in order: for drawings, and to find out why a request waited.

log = EventLog("events.jsonl")          one JSON object per line, written as it happens
RequestLoop(model, events=log)
log.events                              the last ones, as objects
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any, TextIO

_MOST_EVENTS = 100_000


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        time: seconds since the loop was made.
    """

    time: float


@dataclass(frozen=True)
class RequestQueued(Event):
    """A request was submitted, with so many tokens in its prompt."""

    request: int
    prompt_tokens: int


@dataclass(frozen=True)
class RequestStarted(Event):
    """Reading of a prompt began. `reused_tokens` of it come from a prefix of other requests or from a store."""

    request: int
    reused_tokens: int


@dataclass(frozen=True)
class ChunkRead(Event):
    """So many tokens of a prompt were read, in so many seconds."""

    request: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class RequestJoined(Event):
    """A request became a row of the batch, for the first time or again."""

    request: int


@dataclass(frozen=True)
class StepDone(Event):
    """A step gave each of `rows` requests a token, while others waited. Bytes are of all caches of the loop."""

    rows: int
    waiting: int
    seconds: float
    gpu_bytes: int
    cpu_bytes: int


@dataclass(frozen=True)
class RequestPaused(Event):
    """A request left the batch and waits, with its pages. `reason` is "memory" or "turn"."""

    request: int
    reason: str


@dataclass(frozen=True)
class RequestEnded(Event):
    """A request ended. `reason` is a `finish_reason` of its result."""

    request: int
    reason: str
    tokens: int


_KINDS = {
    kind.__name__: kind
    for kind in (RequestQueued, RequestStarted, ChunkRead, RequestJoined, StepDone, RequestPaused, RequestEnded)
}


class EventLog:
    """Keeps the last events, and writes them to a file if one is given.

    Args:
        path: a file of JSON lines, which is replaced; None for none.
        most: events that are kept in memory.
    """

    def __init__(self, path: str | PathLike[str] | None = None, most: int = _MOST_EVENTS) -> None:
        self.events: deque[Event] = deque(maxlen=most)
        self._file: TextIO | None = None if path is None else open(path, "w", encoding="utf-8")  # noqa: SIM115

    def add(self, event: Event) -> None:
        """Record an event."""
        self.events.append(event)
        if self._file is not None:
            self._file.write(json.dumps(as_dict(event)) + "\n")

    def flush(self) -> None:
        """Write what is buffered."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Close the file. Later events are kept in memory only."""
        if self._file is not None:
            self._file.close()
            self._file = None


def as_dict(event: Event) -> dict[str, Any]:
    """An event as an object of a JSON line: its fields, and its type as "event"."""
    return {"event": type(event).__name__, **asdict(event)}


def read_events(lines: Iterable[str]) -> list[Event]:
    """The events of a file that an `EventLog` wrote."""
    found: list[Event] = []
    for line in lines:
        fields = json.loads(line)
        found.append(_KINDS[fields.pop("event")](**fields))
    return found
