"""What a cache must attend to, written again from the documentation, in float64: the oracle of the sparse tests.

    zones     a page with one of the first `sinks` or of the last `recent` valid tokens is always attended to
    choice    ShadowKV: of the other pages with valid tokens, outliers (lowest min-cosine of a key to its page's mean) first,
              then the highest  max over the group of softmax over these pages (scale * q . mean);  ceil(budget / 8) in all
              Quest: the highest  max over the group of the largest q . k of any k in the box of the page's keys;
              ceil(budget / 16) pages of 16, and all in the first `dense_layers`
              SeerAttention: the highest  q' . k' / sqrt(E), k' of the largest, smallest and mean key before RoPE and q' of the
              group's queries before RoPE, each by a matrix and rotated again; ceil(budget / 32) pages of 32, with a
              threshold those of them whose softmax over these pages is above it
              with `int8`, of the mean or box that scores the page every number is rounded to 127 steps of either sign
    budget    tokens, or a share of the valid tokens up to the query; a sequence with no more than that, or no more than
              `dense_below`, is attended to whole

Nothing here comes from spin_hf. Where float32 could choose otherwise (a near tie) `NearTieError` is raised: the test then
takes other random data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

PAGE_SIZE = 8
_MARGIN = 2e-5


class NearTieError(Exception):
    """Two pages are so close that float32 may order them otherwise."""


@dataclass(frozen=True)
class SeerRules:
    """Gates as plain numbers: [layer][KV head] matrices key [3 D, E] and query [G, D, E], and angles per position."""

    key: np.ndarray
    query: np.ndarray
    angles: list[float]
    gate_angles: list[float]
    interleaved: bool = False
    page_size: int = 32
    threshold: float | None = None


@dataclass(frozen=True)
class Rules:
    """The options and the model's attention arguments."""

    budget: int | float
    num_sink_tokens: int = 4
    recent_window: int = 64
    dense_below: int = 0
    outliers_per_1024: int = 24
    scale: float = 1.0
    softcap: float | None = None
    quest: bool = False
    int8: bool = False
    dense_layers: int = 0
    seer: SeerRules | None = None

    @property
    def page_size(self) -> int:
        if self.seer is not None:
            return self.seer.page_size
        return 16 if self.quest else PAGE_SIZE

    def budget_tokens(self, held: int) -> int:
        """Tokens to select for a query whose sequence holds `held` valid tokens."""
        if isinstance(self.budget, int):
            return self.budget
        return math.ceil(Fraction(repr(self.budget)) * held)


def attended(
    rules: Rules, keys: np.ndarray, valid: np.ndarray, query: np.ndarray, position: int, layer: int = 0, head: int = 0
) -> list[int]:
    """The tokens that the query at `position` attends to.

    Args:
        keys: [L, D], of one KV head of one sequence; valid: [L]; query: [G, D], the query heads of that KV head.
    """
    seen = [token for token in range(position + 1) if valid[token]]
    pages: dict[int, list[int]] = {}
    for token in seen:
        pages.setdefault(token // rules.page_size, []).append(token)
    if layer < rules.dense_layers or len(seen) <= max(rules.dense_below, rules.budget_tokens(len(seen))):
        return seen
    always = {token // rules.page_size for token in seen[: rules.num_sink_tokens]}
    always |= {token // rules.page_size for token in seen[max(0, len(seen) - rules.recent_window) :]}
    candidates = [page for page in sorted(pages) if page not in always]
    budget = rules.budget_tokens(len(seen))
    if rules.seer is not None:
        chosen = _choose_seer(rules.seer, keys, seen, pages, candidates, query, budget, layer, head)
    else:
        choose = _choose_quest if rules.quest else _choose
        chosen = choose(rules, keys, pages, candidates, query, budget)
    return [token for page in sorted(always | chosen) for token in pages[page]]


def _choose(
    rules: Rules, keys: np.ndarray, pages: dict[int, list[int]], candidates: list[int], query: np.ndarray, budget: int
) -> set[int]:
    exact = {page: np.mean([keys[token] for token in pages[page]], axis=0) for page in candidates}
    means = {page: _in_127_steps(mean) if rules.int8 else mean for page, mean in exact.items()}
    outliers: list[int] = []
    if rules.outliers_per_1024:
        likeness = {page: min(_cosine(keys[token], exact[page]) for token in pages[page]) for page in candidates}
        count = max(1, round(Fraction(rules.outliers_per_1024 * budget, 1024)))
        outliers = _lowest(likeness, count)
    scores = dict.fromkeys(candidates, -math.inf)  # logarithms
    for head in query:
        logits = {page: rules.scale * float(head @ means[page]) for page in candidates}
        total = math.log(sum(math.exp(logit) for logit in logits.values())) if logits else 0.0
        for page in candidates:
            scores[page] = max(scores[page], logits[page] - total)
    left = {page: -score for page, score in scores.items() if page not in outliers}
    room = math.ceil(budget / PAGE_SIZE)
    return set(outliers[:room]) | set(_lowest(left, max(0, room - len(outliers))))


def _in_127_steps(vector: np.ndarray) -> np.ndarray:
    """Each number as the nearest of -127, ..., 127 steps, of which the largest number has 127."""
    step = max(abs(number) for number in vector) / 127
    return np.array([round(number / step) * step for number in vector]) if step else vector


def _choose_quest(
    rules: Rules, keys: np.ndarray, pages: dict[int, list[int]], candidates: list[int], query: np.ndarray, budget: int
) -> set[int]:
    scores = {}
    for page in candidates:
        inside = np.array([keys[token] for token in pages[page]])
        lows, highs = (_in_127_steps(side) if rules.int8 else side for side in (inside.min(0), inside.max(0)))
        scores[page] = -max(
            sum(max(q * low, q * high) for q, low, high in zip(head, lows, highs, strict=True)) for head in query
        )
    return set(_lowest(scores, math.ceil(budget / 16)))


def _choose_seer(
    seer: SeerRules, keys: np.ndarray, seen: list[int], pages: dict[int, list[int]], candidates: list[int],
    query: np.ndarray, budget: int, layer: int, head: int,
) -> set[int]:  # fmt: skip
    stands = {token: count for count, token in enumerate(seen)}
    before = np.array([turn(state, -stands[seen[-1]], seer.angles, seer.interleaved) for state in query])
    asked = sum(state @ matrix for state, matrix in zip(before, seer.query[layer, head], strict=True))
    asked = turn(asked, stands[seen[-1]], seer.gate_angles, False)
    logits = {}
    for page in candidates:
        inside = np.array([turn(keys[token], -stands[token], seer.angles, seer.interleaved) for token in pages[page]])
        pooled = np.concatenate([inside.max(0), inside.min(0), inside.mean(0)])
        gate_key = turn(pooled @ seer.key[layer, head], stands[pages[page][0]], seer.gate_angles, False)
        logits[page] = float(gate_key @ asked) / math.sqrt(len(gate_key))
    chosen = _lowest({page: -logit for page, logit in logits.items()}, math.ceil(budget / seer.page_size))
    if seer.threshold is None:
        return set(chosen)
    total = sum(math.exp(logit) for logit in logits.values())
    shares = {page: math.exp(logits[page]) / total for page in chosen}
    if any(abs(share - seer.threshold) < _MARGIN for share in shares.values()):
        raise NearTieError(f"{shares} near {seer.threshold}")
    if len(chosen) == len(candidates):
        return set(chosen)
    return {page for page in chosen if shares[page] > seer.threshold}


def turn(state: np.ndarray, position: int, angles: list[float], interleaved: bool) -> np.ndarray:
    """One state [D], each pair of channels turned as a complex number by its angle, `position` times."""
    turned, count = np.array(state, dtype=float), len(angles)
    for i, angle in enumerate(angles):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, count + i)
        number = complex(state[a], state[b]) * complex(math.cos(position * angle), math.sin(position * angle))
        turned[a], turned[b] = number.real, number.imag
    return turned


def _lowest(values: dict[int, float], count: int) -> list[int]:
    order = sorted(values, key=lambda page: values[page])
    if 0 < count < len(order) and values[order[count]] - values[order[count - 1]] < _MARGIN:
        raise NearTieError(f"{values[order[count - 1]]} and {values[order[count]]}")
    return order[:count]


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def attention(
    rules: Rules, keys: np.ndarray, values: np.ndarray, tokens: list[int], query: np.ndarray, sink_logit: float | None
) -> np.ndarray:
    """Softmax attention of one query head [D] over the given tokens of keys [L, D] and values [L, Dv]: [Dv]."""
    scores = rules.scale * keys[tokens] @ query
    if rules.softcap is not None:
        scores = rules.softcap * np.tanh(scores / rules.softcap)
    top = max(scores.max(), -math.inf if sink_logit is None else sink_logit)
    weights = np.exp(scores - top)
    total = weights.sum() + (0.0 if sink_logit is None else math.exp(sink_logit - top))
    return weights / total @ values[tokens]
