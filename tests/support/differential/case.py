"""One case of the differential test, drawn from a seed: a family, a method, options, and what may happen to the cache.

Case.draw(seed)     the same seed gives the same case, and with `history.py` the same operations
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from spin_hf import Bisection, Fitted, Method, Quest, RetroInfer, ShadowKV, plan
from tests.support.clustering_methods import Clumped, SelectingAll, ShuffledWhole, clustering_often
from tests.support.families import FAMILIES
from tests.support.seer_gates import gates_for
from tests.support.zoo import subject_model

ANY_METHOD = [name for name, family in FAMILIES.items() if family.paged]
LINEAR = ("qwen3_next",)
"""Families whose linear attention overwrites its states: no crop."""
SEER_FAMILIES = ("llama", "qwen3", "gemma")
"""Families that plain random gates fit."""

SelectAll = type("SelectAll", (SelectingAll, ShadowKV), {})
SelectAllQuest = type("SelectAllQuest", (SelectingAll, Quest), {})


@cache
def _gates(family: str) -> Method:
    return gates_for(subject_model(family), Path(tempfile.mkdtemp(prefix="spin_hf-gates-")))


METHODS: dict[str, Callable[[str], Method]] = {
    "bisection": lambda family: clustering_often(Bisection, 64, 24)(),
    "shadowkv": lambda family: ShadowKV(),
    "quest": lambda family: Quest(dense_layers=0),
    "fitted": lambda family: clustering_often(Fitted, 64, 24)(),
    "retroinfer": lambda family: clustering_often(RetroInfer, 64, 24)(),
    "seer": _gates,
    "clumped": lambda family: Clumped(),
    "select all": lambda family: SelectAll(),
    "select all, quest": lambda family: SelectAllQuest(dense_layers=0),
    "select all, clustered": lambda family: ShuffledWhole(),
}
"""With spans so short that a context of some hundred tokens has several. The last three select all candidates."""


@dataclass(frozen=True)
class Case:
    """See the module's head.

    Attributes:
        exact: compared with DynamicCache, as nothing is left out; else with a cache of the same options without a cap.
        tiered: with a cap on `gpu_memory`, the least that `plan` allows for the largest batch to come.
        refuses: the cap is for a smaller batch, so that some operations are refused; they then change nothing.
        interrupts: how likely an operation is to be interrupted.
        from_config: the cache is given the config instead of the model.
        unseen: and no forward shows it a model, as if that were none of transformers'.
        records: layers with a window record their past, so that the cache can be cropped.
        max_rows, max_tokens: limits of the batch.
    """

    seed: int
    family: str
    method: str
    exact: bool
    tiered: bool
    refuses: bool
    interrupts: float
    from_config: bool
    unseen: bool
    records: bool
    max_rows: int
    max_tokens: int
    operations: int
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def draw(cls, seed: int) -> Case:
        """The case of a seed."""
        dice = random.Random(f"case {seed}")
        exact = dice.random() < 0.55
        names = list(METHODS) if exact else list(METHODS)[:6]
        method = dice.choice(names)
        families = SEER_FAMILIES if method == "seer" else ("llama",) * 6 + tuple(ANY_METHOD)
        max_tokens = dice.choice([150, 220, 300, 400])
        tiered = not exact or dice.random() < 0.7
        family = dice.choice(families)
        refuses, interrupts = tiered and dice.random() < 0.15, dice.choice([0.0, 0.0, 0.15, 0.35])
        from_config = dice.random() < 0.25
        return cls(
            seed=seed,
            family=family,
            method=method,
            exact=exact,
            tiered=tiered,
            refuses=refuses,
            interrupts=interrupts,
            from_config=from_config,
            unseen=from_config and seed % 2 == 0,
            records=dice.random() < 0.6,
            max_rows=dice.choice([1, 2, 3, 4]),
            max_tokens=max_tokens,
            operations=dice.randint(4, 12),
            options=_zones(dice) | {"budget": _budget(dice, method, exact, max_tokens)},
        )

    def make_method(self) -> Method:
        return METHODS[self.method](self.family)

    def cap(self) -> dict[str, Any]:
        """`gpu_memory` as this case wants it."""
        if not self.tiered:
            return {}
        share = 2 if self.refuses else 1
        planned = plan(
            subject_model(self.family),
            context_length=self.max_tokens // share,
            batch_size=max(1, self.max_rows // share),
            method=self.make_method(),
            **self.options,
        )
        return {"gpu_memory": planned.smallest_gpu_memory}

    def __str__(self) -> str:
        kind = "exact" if self.exact else "sparse"
        flags = [name for name in ("tiered", "refuses", "from_config", "unseen", "records") if getattr(self, name)]
        return f"case {self.seed}: {self.family}, {self.method}, {kind}, {', '.join(flags)}, {self.options}"


def _zones(dice: random.Random) -> dict[str, Any]:
    zones = {"num_sink_tokens": dice.choice([0, 4, 9]), "recent_window": dice.choice([1, 8, 8, 23])}
    return zones | ({"dense_below": 40} if dice.random() < 0.1 else {})


def _budget(dice: random.Random, method: str, exact: bool, max_tokens: int) -> int | float:
    if method.startswith("select all"):
        return dice.choice([9, 24])
    if exact:
        return dice.choice([1 << 20, max_tokens])
    return dice.choice([9, 16, 32, 0.1, 0.3])
