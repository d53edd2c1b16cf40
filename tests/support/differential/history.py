"""Plays a case: the same operations on the cache under test and on the reference.

Every operation is made on the subject first, as it may be refused or interrupted there; then on the reference. The logits of
every forward agree, and at the end keys and values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import Cache

from spin_hf import BudgetError, SpinCache
from tests.support.differential.batch import Batch, four_dimensional, new_tokens, positions
from tests.support.differential.comparison import HAPPENED, Comparison, Contents, Side, TieError, contents

TRIMS_ALWAYS = Version(transformers.__version__) < Version("5.18")
"""Whether windows that record their past have to be cut back after every forward."""


class History(Comparison):
    """See the module's head."""

    def play(self) -> None:
        """All operations of the case. Any error is a failure of the test."""
        try:
            self.prompt()
            for _ in range(self.case.operations):
                self.dice.choice(self._possible())()
                self._check_length()
            self.decode()
            self.check_contents()
            self.subject.cache.check_integrity()
        except TieError:
            self.note("a tie")

    def _possible(self) -> list[Callable[[], None]]:
        if not self.batch.length:
            return [self.prompt, self.prompt, self.generate]
        usual = [self.decode, self.decode, self.several, self.many, self.verify, self.generate, self.reorder, self.copy]
        usual.append(self.release)
        if self.crops:
            usual += [self.crop, self.crop]
        if "select" not in self.limits:
            usual += [self.select, self.repeat, self.beams]
        if self.case.method != "seer" and not self.windowed:
            usual.append(self.given_mask)
        if self.saved is not None:
            usual.append(self.swap)
        if self.case.exact:
            usual.append(self.adopt)
        return usual + ([self.reset] if self.dice.random() < 0.4 else [])

    def _check_length(self) -> None:
        held = self.subject.cache.get_seq_length()
        assert held == self.batch.length, f"the cache says {held} tokens, expected {self.batch.length}"

    # ------------------------------------------------------------------------------------------------------ forwards

    def prompt(self) -> None:
        room = self.case.max_tokens
        count = self.dice.choice([1, 7, 40, 64, 130, self.dice.randint(1, room)])
        padding = self.dice.choice(["none", "none", "left", "left", "right", "holes"])
        if self.case.exact and self.dice.random() < 0.1:
            self.take_over(min(count, room - 10), padding)
        elif self.case.method != "seer" and self.dice.random() < 0.1:
            self.forward(min(count, room - 10), "none", given_mask=True)
        else:
            self.forward(min(count, room - 10), padding)

    def decode(self) -> None:
        for _ in range(self.dice.randint(1, 4)):
            self.forward(1, self.dice.choice(["none", "none", "none", "holes"]))

    def several(self) -> None:
        self.forward(self.dice.randint(2, 16), self.dice.choice(["none", "left", "right", "holes"]))

    def many(self) -> None:
        self.forward(self.dice.choice([17, 33, 64, 90]), self.dice.choice(["none", "left", "right", "holes"]))

    def given_mask(self) -> None:
        self.forward(self.dice.choice([1, 1, 5, 20]), "none", given_mask=True)

    def verify(self) -> None:
        """Several tokens of which some are refused."""
        count = self.dice.randint(2, 9)
        if self.forward(count, "none") and self.crops:
            self._crop(self.dice.randint(1, count - 1))

    def forward(self, count: int, padding: str, given_mask: bool = False) -> bool:
        """New tokens through both models; returns whether there was room for them."""
        dice, batch, seer = self.dice, self.batch, self.case.method == "seer"
        if batch.length + count > self.case.max_tokens:
            return False
        ids, new_valid = new_tokens(batch.rows, count, dice, padding)
        if batch.length and not given_mask and not seer and dice.random() < 0.12:
            batch = batch.with_other_holes(dice)
        arguments: dict[str, Any] = {}
        if padding == "none" and not given_mask and bool(batch.fed.all()) and dice.random() < 0.4:
            batch, what = batch.shown(), "no mask"
        else:
            what = "a 4-D mask" if given_mask else f"padding {padding}"
        extended = batch.followed_by(ids, new_valid)
        if given_mask:
            arguments["attention_mask"] = four_dimensional(extended.valid, count, dice, self.adds)
        elif what != "no mask":
            arguments["attention_mask"] = extended.valid.long()
        if (seer and "attention_mask" in arguments) or dice.random() < 0.3:
            arguments["position_ids"] = positions(extended.valid, count)
        self.note(f"forward of {count} behind {batch.length} in {batch.rows} rows, {what}, {sorted(arguments)[1:]}")

        def call(side: Side) -> Tensor:
            with torch.no_grad(), self.choices.of("ours" if side is self.subject else "theirs"):
                return side.model(input_ids=ids, past_key_values=side.cache, use_cache=True, **arguments).logits

        ours = self.attempt(
            "forward" if batch.length else "prompt",
            lambda: call(self.subject),
            lambda: self.subject.cache.get_seq_length() == extended.length,
        )
        if ours is None:
            return False
        theirs = call(self.reference)
        if ours is not HAPPENED and bool(new_valid.any()):
            self.compare(ours[new_valid], theirs[new_valid], "logits")
        self.batch, self.recorded = extended, self.recorded + count
        self._trim()
        return True

    def _trim(self) -> None:
        if self.case.records and self.crops and (TRIMS_ALWAYS or self.dice.random() < 0.5):
            for side in (self.subject, self.reference):
                side.cache.crop(0)
            self.recorded = 0

    # ------------------------------------------------------------------------------------------------------ generate

    def generate(self) -> None:
        """Through `generate`, after more tokens of the user."""
        dice, batch = self.dice, self.batch
        count, new = dice.randint(1, 12) if batch.length else dice.choice([30, 80]), dice.randint(1, 8)
        ways: list[dict[str, Any]] = [{}, {"do_sample": True, "top_k": 20}]
        if not batch.length or not TRIMS_ALWAYS:  # older transformers compute the past again
            ways.append({"prefill_chunk_size": dice.randint(2, 9)})
        if (
            batch.rows == 1 and not batch.length and "prompt_lookup" not in self.limits
        ):  # else it computes the past again
            ways.append({"prompt_lookup_num_tokens": 3})
        way = dice.choice(ways)
        if batch.length + count + new > self.case.max_tokens:
            return
        asked = self._question(count)
        self.note(f"generate {new} behind {batch.length} + {count} in {batch.rows} rows, {way}")
        ours = self._interruptible_generate(asked, new, way)
        if ours is None:
            return
        with self.choices.of("theirs"):
            theirs = _generate(self.reference, self.reference.cache, asked, new, way)
        self.compare_generated(ours, theirs)
        made = ours.sequences[:, asked.length : -1]
        self.batch = asked.followed_by(made, torch.ones_like(made, dtype=torch.bool))
        self.recorded = 0 if "prompt_lookup_num_tokens" in way else self.recorded + count + new - 1
        self._trim()

    def _question(self, count: int) -> Batch:
        padding = self.dice.choice(["none", "left", "left"])
        return self.batch.followed_by(*new_tokens(self.batch.rows, count, self.dice, padding))

    def _interruptible_generate(self, asked: Batch, new: int, way: dict[str, Any]) -> Any:
        cache, held = self.subject.cache, self.batch.length

        def call() -> Any:
            try:
                with self.choices.of("ours"):
                    return _generate(self.subject, cache, asked, new, way)
            except BudgetError:
                if not self.case.refuses:
                    raise
            self.note("    refused on the way")
            self._roll_back()
            return HAPPENED if happened() else None

        def happened() -> bool:
            more = cache.get_seq_length() - held
            assert more >= 0, f"{-more} tokens are gone"
            self.note(f"    with {more} tokens more")
            if more and not self.windowed and not self.linear:
                cache.crop(-more)
                return False
            return more > 0

        given = self.attempt("generate", call, happened)
        if given is HAPPENED:
            self._empty()
            return None
        return given

    def beams(self) -> None:
        """Beam search on copies, as it leaves beams in the cache."""
        dice, batch = self.dice, self.batch
        if batch.length + 14 > self.case.max_tokens or batch.rows * 2 > self.case.max_rows or self.case.refuses:
            return
        asked, way = self._question(dice.randint(1, 6)), {"num_beams": 2, "num_return_sequences": dice.choice([1, 2])}
        self.note(f"beam search behind {batch.length} + {asked.length - batch.length} in {batch.rows} rows")

        def found(side: Side) -> Any:
            cache = copy.deepcopy(side.cache)
            cache.batch_repeat_interleave(2)
            with self.choices.of("ours" if side is self.subject else "theirs"):
                return _generate(side, cache, asked, 6, way)

        ours, theirs = found(self.subject), found(self.reference)
        self.compare(ours.sequences_scores, theirs.sequences_scores, "scores of beams")
        if not torch.equal(ours.sequences, theirs.sequences):
            raise TieError

    # --------------------------------------------------------------------------------------- operations on the cache

    def crop(self) -> None:
        most = self.recorded if self.windowed else self.batch.length
        count = self.dice.choice([0, 1, 3, 17, self.dice.randint(0, self.batch.length)])
        if count <= most:
            self._crop(count)

    def _crop(self, count: int) -> None:
        if self.windowed and count > self.recorded:
            return
        self.note(f"crop {count}")
        self._operate("crop", lambda side: side.cache.crop(-count), self.batch.cut(self.batch.length - count))
        self.recorded = 0
        if not self.batch.length:
            self._empty()

    def reorder(self) -> None:
        order = [self.dice.randrange(self.batch.rows) for _ in range(self.batch.rows)]
        self.note(f"reorder {order}")
        self._operate("select", lambda side: side.cache.reorder_cache(torch.tensor(order)), self.batch.select(order))

    def select(self) -> None:
        rows = self.dice.sample(range(self.batch.rows), self.dice.randint(1, self.batch.rows))
        chosen = torch.tensor(rows)
        if self.dice.random() < 0.3:
            rows = sorted(rows)
            chosen = torch.tensor([row in rows for row in range(self.batch.rows)])
        self.note(f"select {chosen.tolist()}")
        self._operate("select", lambda side: side.cache.batch_select_indices(chosen), self.batch.select(rows))

    def repeat(self) -> None:
        repeats = self.dice.randint(1, max(1, self.case.max_rows // self.batch.rows))
        self.note(f"repeat {repeats}")
        rows = [row for row in range(self.batch.rows) for _ in range(repeats)]
        self._operate("select", lambda side: side.cache.batch_repeat_interleave(repeats), self.batch.select(rows))

    def _operate(self, kind: str, call: Callable[[Side], object], after: Batch) -> None:
        """An operation on both caches; an interrupted one has happened or not."""

        def happened() -> bool:
            if self._holds(after, self.reference_after(call)):
                return True
            problem = self._problem(self.batch, contents(self.reference.cache))
            assert not problem, f"neither as before nor as after: {problem}"
            return False

        def ours() -> bool:
            call(self.subject)
            return True

        if self.attempt(kind, ours, happened) is not None:
            call(self.reference)
            self.batch = after

    def reference_after(self, call: Callable[[Side], object]) -> Contents:
        """What the reference would hold."""
        twin = Side(self.reference.model, self.reference.make, copy.deepcopy(self.reference.cache))
        call(twin)
        return contents(twin.cache)

    def reset(self) -> None:
        self.note("reset")

        def happened() -> bool:
            if self.subject.cache.get_seq_length() == 0:
                return True
            self.check_contents()
            return False

        self.attempt("reset", self.subject.cache.reset, happened)
        self._empty()

    def copy(self) -> None:
        """Continue with a copy; the original may come back."""
        self.note("copy")
        before = self.subject.cache

        def happened() -> bool:
            self.check_contents()
            return False

        made = self.attempt("copy", lambda: copy.deepcopy(before), happened)
        if made is not None:
            theirs = copy.deepcopy(self.reference.cache)
            self.saved = before, self.reference.cache, self.batch, self.recorded
            self.subject.cache, self.reference.cache = made, theirs

    def swap(self) -> None:
        """Continue with the cache that was put aside."""
        assert self.saved is not None
        self.note("swap")
        now = self.subject.cache, self.reference.cache, self.batch, self.recorded
        (self.subject.cache, self.reference.cache, self.batch, self.recorded), self.saved = self.saved, now

    def release(self) -> None:
        """Give GPU memory back; nothing else may change."""
        wanted = self.dice.choice([None, 1, 4096, "20kB"])
        self.note(f"release {wanted}")
        cache: Any = self.subject.cache
        self.attempt("release", lambda: cache.release_gpu_memory(wanted) or True, lambda: False)

    def adopt(self) -> None:
        """Continue with a cache that took over the contents of the DynamicCache."""
        self.note("from_cache")
        made = self._taken_over(self.reference.cache, self.batch)
        if made is not None:
            self.subject.cache = made

    def take_over(self, count: int, padding: str) -> None:
        """As `adopt`, after a prompt."""
        ids, valid = new_tokens(self.batch.rows, count, self.dice, padding)
        self.note(f"from_cache of {count} tokens in {self.batch.rows} rows, padding {padding}")
        batch = self.batch.followed_by(ids, valid)
        arguments = {"attention_mask": valid.long(), "position_ids": positions(valid, count)}
        source = self.reference.make()
        if self.case.records:
            source.activate_past_recording()
        with torch.no_grad():
            self.reference.model(input_ids=ids, past_key_values=source, use_cache=True, **arguments)
        made = self._taken_over(source, batch)
        if made is not None:
            self.subject.cache, self.reference.cache = made, source
            self.batch, self.recorded = batch, count

    def _taken_over(self, source: Cache, batch: Batch) -> Any:
        def call() -> Any:
            return SpinCache.from_cache(source, self.given, attention_mask=batch.valid.long(), **self.adopted)

        return self.attempt("from_cache", call, lambda: False)


def _generate(side: Side, cache: Cache, asked: Batch, new: int, way: dict[str, Any]) -> Any:
    torch.manual_seed(asked.length)
    return side.model.generate(
        asked.ids,
        attention_mask=asked.valid.long(),
        past_key_values=cache,
        max_new_tokens=new,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        **{"do_sample": False, **way},
    )
