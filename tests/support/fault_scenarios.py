"""Calls that are made to fail: forwards and operations of each kind, and how the same cache continues afterwards.

    SCENARIOS: name -> Scenario(options, before, call, after)

    before    brings an empty cache to where the call begins
    call      the call that fails: a forward, or an operation on the cache; returns logits, or None
    after     continues: logits

    Rehearsal   caches on which one scenario is tried again and again

Sizes: pages of 8, segments of 32 pages, so 256 tokens fill the first segment of a sequence and token 257 takes a new one.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from spin_hf import Bisection, Fitted, SpinCache
from tests.support.clustering_methods import Clumped, clustering_often
from tests.support.memory import SMALL_ZONES
from tests.support.tuning import retuned
from tests.support.zoo import random_tokens, subject_model

IDS = random_tokens(4, 400, seed=3)
BUDGET: dict[str, Any] = {"method": "shadowkv", "budget": 48, **SMALL_ZONES}
"""A budget that leaves tokens out, so that the selection matters."""


@dataclass
class Run:
    """A cache, its model, the tokens of `IDS` that it holds, and of which rows."""

    model: Any
    cache: SpinCache
    at: int = 0
    rows: list[int] = field(default_factory=lambda: [0, 1])

    @torch.no_grad()
    def feed(self, count: int, mask: Tensor | None = None) -> Tensor:
        """The next `count` tokens in one forward."""
        ids = IDS[self.rows, self.at : self.at + count]
        logits: Tensor = self.model(ids, past_key_values=self.cache, attention_mask=mask).logits
        self.at += count
        return logits

    def decode(self, steps: int = 3) -> Tensor:
        return torch.cat([self.feed(1) for _ in range(steps)], 1)


Step = Callable[[Run], Any]


def _nothing(run: Run) -> None:
    return None


def feed(*counts: int) -> Step:
    def step(run: Run) -> Tensor:
        return torch.cat([run.feed(count) for count in counts], 1)

    return step


def then(*steps: Step) -> Step:
    def step(run: Run) -> Any:
        return [each(run) for each in steps][-1]

    return step


def on_cache(method: str, *arguments: Any, rows: list[int] | None = None, removes: int = 0) -> Step:
    def step(run: Run) -> None:
        getattr(run.cache, method)(*arguments)
        run.rows = run.rows if rows is None else [run.rows[row] for row in rows]
        run.at -= removes

    return step


def padded(count: int, columns: slice, real_before: bool = False) -> Step:
    """Tokens with padding in the first sequence, which may have been taken for real before."""

    def step(run: Run) -> Tensor:
        mask = torch.ones((2, run.at + count), dtype=torch.int64)
        mask[0, columns] = 0
        return run.feed(count, mask)

    return step


def layer_by_layer(step: Step) -> Step:
    """With temporary memory for one layer at a time."""

    def alone(run: Run) -> Any:
        with retuned(run.cache, index_bytes=1):
            return step(run)

    return alone


_GOES_ON = feed(1, 3)


@dataclass
class Scenario:
    """See the module's head.

    Attributes:
        forward: whether `call` is a forward of the model.
        recodes: whether `call` converts pages to int8. Where it fails they stay int8, so contents are as after the call.
    """

    call: Step
    before: Step = _nothing
    after: Step = _GOES_ON
    options: dict[str, Any] = field(default_factory=dict)
    family: str = "llama"
    forward: bool = True
    recodes: bool = False


@dataclass(kw_only=True)
class Rehearsal:
    """Fresh caches for one scenario, each where its call begins.

    Args:
        from_model: whether caches are made with the model, or with its config.
        tolerance: absolute, of logits behind a failure; pages may be summarised by another order of summation.
    """

    scenario: Scenario
    from_model: bool = False
    tolerance: float = 0.0

    @cached_property
    def model(self) -> Any:
        return subject_model(self.scenario.family)

    def fresh(self) -> Run:
        """A new cache."""
        options = {**BUDGET, **self.scenario.options}
        run = Run(self.model, SpinCache(self.model if self.from_model else self.model.config, **options))
        self.scenario.before(run)
        return run

    @cached_property
    def base(self) -> Run:
        return self.fresh()

    def copy(self) -> Run:
        """A copy of the same cache."""
        return Run(self.base.model, deepcopy(self.base.cache), self.base.at, list(self.base.rows))


_PAGED = {"gpu_memory": "200kB"}
_MOVES = {"gpu_memory": "400kB"}
"""Two segments of two sequences take 280 kB in both layers, four twice as much."""
_INT8 = {"cpu_dtype": "int8"}
_CLUSTERS = {"method": clustering_often(Clumped, 64, 24)()}
_BISECTS = {"method": clustering_often(Bisection, 64, 24)(2)}
_FITS = {"method": clustering_often(Fitted, 64, 24)()}
_TO_BEAMS = on_cache("reorder_cache", torch.tensor([1, 1]), rows=[1, 1])

SCENARIOS: dict[str, Scenario] = {
    "prompt": Scenario(feed(60)),
    "prompt, padded": Scenario(padded(60, slice(0, 11)), after=padded(1, slice(0, 11))),
    "prompt, paged": Scenario(feed(270), options=_PAGED),
    "second prompt": Scenario(feed(50), before=feed(60)),
    "second prompt, paged": Scenario(feed(30), before=feed(270, 1), options=_PAGED),
    "token": Scenario(feed(1), before=feed(60, 1)),
    "token that completes a page": Scenario(feed(1), before=feed(62, 1)),
    "token that takes a segment": Scenario(feed(1), before=feed(255, 1)),
    "token that moves pages to the cpu tier": Scenario(feed(1), before=feed(255, 1), options=_MOVES),
    "token, paged": Scenario(feed(1), before=feed(270, 1), options=_PAGED),
    "verification": Scenario(feed(5), before=feed(60, 1)),
    "verification, paged": Scenario(feed(5), before=feed(270, 1), options=_PAGED),
    "tokens turn to padding": Scenario(padded(1, slice(3, 20)), before=feed(60, 1), after=padded(1, slice(3, 20))),
    "copies of what is shared": Scenario(feed(1), before=then(feed(60, 1), _TO_BEAMS)),
    "copies of what is shared, paged": Scenario(feed(1), before=then(feed(270, 1), _TO_BEAMS), options=_PAGED),
    "reorder": Scenario(_TO_BEAMS, before=feed(60, 1), forward=False),
    "reorder, padded": Scenario(_TO_BEAMS, before=padded(60, slice(0, 9)), forward=False),
    "reorder, paged": Scenario(_TO_BEAMS, before=feed(270, 1), options=_PAGED, forward=False),
    "select, paged": Scenario(
        on_cache("batch_select_indices", torch.tensor([1]), rows=[1]),
        before=feed(270, 1),
        options=_PAGED,
        forward=False,
    ),
    "repeat": Scenario(on_cache("batch_repeat_interleave", 2, rows=[0, 0, 1, 1]), before=feed(60, 1), forward=False),
    "repeat, paged": Scenario(
        on_cache("batch_repeat_interleave", 2, rows=[0, 0, 1, 1]), before=feed(270, 1), options=_PAGED, forward=False
    ),
    "crop": Scenario(on_cache("crop", -7, removes=7), before=feed(60, 1), forward=False),
    "crop, paged": Scenario(on_cache("crop", -17, removes=17), before=feed(270, 1), options=_PAGED, forward=False),
    "clustering": Scenario(feed(1), before=feed(160, 1), options=_CLUSTERS),
    "clustering, paged": Scenario(feed(1), before=feed(270, 1), options={**_CLUSTERS, **_PAGED}),
    "clustering, padded": Scenario(
        padded(1, slice(0, 11)),
        before=then(padded(160, slice(0, 11))),
        options=_CLUSTERS,
        after=padded(1, slice(0, 11)),
    ),
    "clustering of what is shared": Scenario(feed(1), before=then(feed(100), _TO_BEAMS, feed(60)), options=_CLUSTERS),
    "clustered tokens turn to padding": Scenario(
        padded(1, slice(30, 50)), before=feed(160, 1, 1), options=_CLUSTERS, after=padded(1, slice(30, 50))
    ),
    "clustered, cropped": Scenario(
        on_cache("crop", -70, removes=70), before=feed(160, 1, 1), options=_CLUSTERS, forward=False
    ),
    "clustering, layer by layer": Scenario(layer_by_layer(feed(1)), before=feed(160, 1), options=_CLUSTERS),
    "clustering of int8 pages": Scenario(feed(1), before=feed(270, 1), options={**_CLUSTERS, **_PAGED, **_INT8}),
    "clustering behind a prompt": Scenario(feed(1), before=feed(160), options=_CLUSTERS),
    "second prompt, clustered": Scenario(feed(30), before=feed(160, 1, 1), options=_CLUSTERS),
    "int8 pages": Scenario(feed(30), before=feed(270, 1), options={**_PAGED, **_INT8}),
    "token that recodes pages": Scenario(feed(1), before=feed(255, 1), options={**_MOVES, **_INT8}, recodes=True),
    "padded batch, paged": Scenario(
        padded(1, slice(0, 200)), before=padded(270, slice(0, 200)), options=_PAGED, after=padded(1, slice(0, 200))
    ),
    "bisection": Scenario(feed(1), before=feed(120, 1), options=_BISECTS),
    "fit": Scenario(feed(1), before=feed(120), options=_FITS),
    "fit, again": Scenario(
        feed(1), before=then(feed(120, 1, 1), on_cache("crop", -70, removes=70), feed(40)), options=_FITS
    ),
    "fit of what is shared": Scenario(feed(1), before=then(feed(40), _TO_BEAMS, feed(40)), options=_FITS),
    "windows": Scenario(feed(1), before=feed(40, 1), family="gemma3_text"),
    "windows, prompt": Scenario(feed(50), family="gemma3_text"),
    "windows, second prompt": Scenario(feed(30), before=feed(40, 1), family="gemma3_text"),
    "windows, reorder": Scenario(_TO_BEAMS, before=feed(40, 1), family="gemma3_text", forward=False),
    "windows, repeat": Scenario(
        on_cache("batch_repeat_interleave", 2, rows=[0, 0, 1, 1]),
        before=feed(40, 1),
        family="gemma3_text",
        forward=False,
    ),
    "linear attention, reorder": Scenario(_TO_BEAMS, before=feed(40, 1), family="qwen3_next", forward=False),
}
