"""The cache under test beside the one that says what is right, and when both agree.

    reference   DynamicCache on a model that no SpinCache touches; for sparse cases a SpinCache without a cap
    subject     SpinCache with the case's options

`attempt` makes a call on the subject. The call may be interrupted at a line drawn at random, and is then made again. The cache
holds either what it held before the interrupted call or what it holds after it. A call that is refused changes nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from spin_hf import BudgetError, SpinCache
from tests.support.compare import RELATIVE_TOLERANCE, difference
from tests.support.differential.batch import Batch
from tests.support.differential.case import LINEAR, Case
from tests.support.differential.ties import Choices
from tests.support.families import FAMILIES
from tests.support.interruptions import Interruption
from tests.support.zoo import oracle_model, subject_model

LINES = {"forward": 3000, "prompt": 3000, "generate": 12000, "release": 300, "copy": 500, "from_cache": 2500}
LINES |= {"crop": 400, "select": 400, "reset": 200}
"""Estimated lines of the package that such a call runs; corrected during a case."""
INTERRUPTED = set(LINES)
"""Calls that may be interrupted: all of them."""
HAPPENED = object()
"""Instead of a result: the interrupted call has happened."""


class TieError(Exception):
    """Two runs selected different tokens, or pages, of nearly equal scores; they cannot be compared any more."""


@dataclass
class Side:
    """A model and a cache of it."""

    model: PreTrainedModel
    make: Callable[[], Cache]
    cache: Cache


Contents = list[tuple[Tensor, ...]]


def contents(cache: Cache) -> Contents:
    """Keys and values of each layer that has some."""
    found: Contents = []
    for layer in cache.layers:
        keys = getattr(layer, "keys", None)
        found.append(() if keys is None or not keys.numel() else (keys, layer.values))
    return found


class Comparison:
    """See the module's head."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.dice = random.Random(f"history {case.seed}")
        self.lines = dict(LINES)
        self.log: list[str] = []
        model, options = subject_model(case.family), case.options | {"method": case.make_method()}
        given = model.config if case.from_config else model
        cap = case.cap()

        def make() -> Cache:
            return SpinCache(given, **options, **cap)

        self.adopted = options | cap
        self.given = given
        self.subject = Side(model, make, make())
        if case.exact:
            oracle = oracle_model(case.family)
            self.reference = Side(
                oracle, lambda: DynamicCache(config=oracle.config), DynamicCache(config=oracle.config)
            )
        else:
            self.reference = Side(model, lambda: SpinCache(given, **options), SpinCache(given, **options))
        shape = DynamicCache(config=model.config)
        self.windowed = any(shape.is_sliding)
        self.linear = case.family in LINEAR
        self.adds = oracle_model(case.family).config._attn_implementation == "eager"
        self.crops = not self.linear and (case.records or not self.windowed)
        self.limits = FAMILIES[case.family].limits()
        self.choices = Choices()
        self.saved: tuple[Cache, Cache, Batch, int] | None = None
        self.compared = 0
        self._start()

    def _start(self) -> None:
        self.batch = Batch.empty(self.dice.randint(1, self.case.max_rows))
        self.recorded = 0
        if self.case.records:
            for side in (self.subject, self.reference):
                side.cache.activate_past_recording()

    def note(self, text: str) -> None:
        self.log.append(text)

    def compare(self, ours: Tensor, theirs: Tensor, what: str) -> None:
        """Floats that have to agree. Sparse runs that diverge at a tie, with correct summaries, end here."""
        off = difference(ours, theirs)
        self.compared += 1
        if off > RELATIVE_TOLERANCE and not self.case.exact and self.choices.part_at_a_tie():
            for side in (self.subject, self.reference):
                side.cache.check_integrity()
            raise TieError
        assert off <= RELATIVE_TOLERANCE, f"{what} are {off:.1e} of the largest away, {RELATIVE_TOLERANCE:.0e} allowed"

    def compare_generated(self, ours: Any, theirs: Any) -> None:
        """Logits step by step as long as the tokens are the same, and the tokens."""
        start = ours.sequences.shape[1] - len(ours.logits)
        assert ours.sequences.shape == theirs.sequences.shape
        for step, (mine, other) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
            self.compare(mine, other, f"logits of step {step}")
            if not torch.equal(ours.sequences[:, start + step], theirs.sequences[:, start + step]):
                raise TieError

    def attempt(self, kind: str, call: Callable[[], Any], happened: Callable[[], bool]) -> Any:
        """The result of a call on the subject, which may first be interrupted.

        Returns:
            HAPPENED where the interrupted call has happened, None where the call was refused (and has changed nothing).
        """
        disturbed = False
        if kind in INTERRUPTED and self.dice.random() < self.case.interrupts:
            with Interruption(self.dice.randint(1, self.lines[kind]) - 1) as interruption:
                try:
                    result = self._or_refused(call)
                except KeyboardInterrupt:
                    disturbed = True
            if not interruption.place:
                self.lines[kind] = max(1, len(interruption.lines))
            if not disturbed:
                return result
            self.note(
                f"    interrupted in line {len(interruption.lines)}, {interruption.place[0]}:{interruption.place[1]}"
            )
            self._roll_back()
            if self.dice.random() < 0.5:
                self.subject.cache.check_integrity()
            if happened():
                self.note("    which has happened")
                return HAPPENED
        return self._or_refused(call)

    def _or_refused(self, call: Callable[[], Any]) -> Any:
        """The result of a call, or None where there is no room for it, and nothing has changed."""
        try:
            return call()
        except BudgetError as error:
            assert self.case.refuses, f"a cap that plan allows was refused: {error}"
            self.note("    refused")
        self._roll_back()
        self.check_contents()
        return None

    def _roll_back(self) -> None:
        """Tell a cache that was made from a config that a forward did not end; one that was made from the model knows."""
        if self.case.from_config:
            cache: Any = self.subject.cache
            cache.roll_back()

    def _empty(self) -> None:
        self.subject.cache.reset()
        self.reference.cache = self.reference.make()  # before 5.18 DynamicCache.reset() keeps the length
        self._start()

    def check_contents(self) -> None:
        """Keys and values of real tokens agree in both caches."""
        problem = self._problem(self.batch, contents(self.reference.cache))
        assert not problem, problem

    def _holds(self, batch: Batch, expected: Contents) -> bool:
        return not self._problem(batch, expected)

    def _problem(self, batch: Batch, expected: Contents) -> str:
        """How the subject's contents differ from those that are expected of a batch; "" if they do not."""
        cache = self.subject.cache
        if cache.get_seq_length() != batch.length:
            return f"the cache says {cache.get_seq_length()} tokens, expected {batch.length}"
        if not batch.length:
            return ""
        for index, (ours, theirs) in enumerate(zip(contents(cache), expected, strict=True)):
            for mine, other in zip(ours, theirs, strict=True):
                if mine.shape != other.shape:
                    return f"layer {index} holds {tuple(mine.shape)}, expected {tuple(other.shape)}"
                real = batch.fed[:, batch.length - mine.shape[2] :]
                if bool(real.any()):
                    off = difference(mine.transpose(1, 2)[real], other.transpose(1, 2)[real])
                    if off > RELATIVE_TOLERANCE:
                        return f"what layer {index} holds is {off:.1e} of the largest away"
        return ""
