"""Ranks of a tensor-parallel model: they agree on memory, and an error on one rank is raised on all.

    with meeting(ranks, "begin a step", batch, tokens):     each rank does its own part
        ...                                                 |
                                                            v
    [what, failed, facts ...]  ->  gathered by all ranks    one message of 64 bytes for each rank, on the CPU
        a rank failed         its error is raised on all ranks: the first one's, by rank
        they differ           CacheStateError on all ranks

A rank that raised alone would leave the others waiting in the model's next all-reduce. So everything that can fail on one rank
only, as it allocates memory, happens in a meeting. All ranks hold a meeting at the same places, because those follow from what
all ranks know: the batch, its tokens, and the options. Steps that allocate nothing hold none.

Messages go through a gloo group of their own. They do not wait for kernels.
"""

from __future__ import annotations

import contextlib
import pickle
import socket
import zlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..errors import CacheStateError

_FACTS = 5
"""Numbers that a message has room for, beside what the meeting is about and whether it failed."""
_TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others. Compiling kernels takes minutes at most."""
_MARK = "_spin_hf_on_all_ranks"
"""Attribute of an error that all ranks have raised."""


class Ranks:
    """The ranks that share the heads of one model.

    Args:
        members: their global ranks, in the order in which they hold heads.
    """

    def __init__(self, members: list[int]) -> None:
        self.size, self.number = len(members), members.index(dist.get_rank())
        self.group: Any = dist.new_group(members, timeout=_TIMEOUT, backend="gloo", use_local_synchronization=True)
        hosts = self._gathered(socket.gethostname())
        self.on_host = hosts.count(hosts[self.number])
        """Ranks on this machine, which share its memory."""

    def gathered(self, what: str, value: Any) -> list[Any]:
        """A picklable value of each rank. `what` and errors as for `smallest`."""
        self._exchanged(what, False, ())
        return self._gathered(value)

    def _gathered(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def smallest(self, what: str, *numbers: int) -> list[int]:
        """The smallest of each of up to five numbers over all ranks.

        Args:
            what: what they are, for the error.
        Raises:
            CacheStateError: the other ranks do something else.
        """
        rows = self._exchanged(what, False, numbers)
        return [min(row[2 + index] for row in rows) for index in range(len(numbers))]

    def end_meeting(self, what: str, error: Exception | None, facts: tuple[int, ...]) -> None:
        """Tell the other ranks how this rank's part went, and raise if one failed."""
        if error is not None and hasattr(error, _MARK):
            raise error
        rows = self._exchanged(what, error is not None, facts, error)
        if any(row != rows[0] for row in rows):
            raise _marked(
                CacheStateError(
                    f"ranks: expected the same call on all ranks, got {[row[2:] for row in rows]} to {what}; give all "
                    "ranks the same batch and options"
                )
            )

    def _exchanged(
        self, what: str, failed: bool, numbers: tuple[int, ...], error: Exception | None = None
    ) -> list[list[int]]:  # fmt: skip
        """The messages of all ranks. Raises if one failed, or is about something else."""
        assert len(numbers) <= _FACTS
        mine = [zlib.crc32(what.encode()), int(failed), *numbers, *[0] * (_FACTS - len(numbers))]
        with torch.inference_mode(False):
            parts = [torch.empty(len(mine), dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(parts, torch.tensor(mine, dtype=torch.int64), group=self.group)
        rows: list[list[int]] = [part.tolist() for part in parts]
        if any(row[1] for row in rows):
            self._raise_first(error)
        if any(row[0] != rows[0][0] for row in rows):
            done = self._gathered(what)
            raise _marked(
                CacheStateError(
                    f"ranks: expected the same call on all ranks, got ranks that {', '.join(done)}; let all ranks run the "
                    "same program"
                )
            )
        return rows

    def _raise_first(self, error: Exception | None) -> None:
        """Raise the error of the first rank that has one."""
        errors = self._gathered(None if error is None else _packed(error))
        number = next(number for number, packed in enumerate(errors) if packed is not None)
        if number == self.number and error is not None:
            raise _marked(error)
        raise _marked(pickle.loads(errors[number])) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self


def meeting(ranks: Ranks | None, what: str, *facts: int) -> contextlib.AbstractContextManager[None]:
    """Run the block on all ranks. If it fails on one of them, all raise its error.

    Args:
        ranks: None for a model on one rank; the block is then just run.
        what: what the block does, for the error.
        facts: up to five numbers that must be the same on all ranks.
    """
    return _ALONE if ranks is None else _meeting(ranks, what, facts)


_ALONE = contextlib.nullcontext()


@contextlib.contextmanager
def _meeting(ranks: Ranks, what: str, facts: tuple[int, ...]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        ranks.end_meeting(what, error, facts)
        raise
    ranks.end_meeting(what, None, facts)


def _marked(error: Exception) -> Exception:
    setattr(error, _MARK, True)
    return error


def _packed(error: Exception) -> bytes:
    """An error as bytes; as a RuntimeError of the same text if it cannot be pickled."""
    try:
        packed = pickle.dumps(error)
        pickle.loads(packed)
    except Exception:  # whatever its `__reduce__` or its constructor raises
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return packed
