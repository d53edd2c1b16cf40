"""Slots of pages against a plain-Python bucketed LRU, on random traces; and the hit rate of bucketed against exact LRU.

The model of one (sequence, KV head): a dict page -> slot, a list of slots with the page in each and the step of its last
touch. Free slots first, then by age in steps (ages from 63 on are equal), then by slot number.
"""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spin_hf.kernels.reference import NUM_BUCKETS, admit_pages


class Residency:
    """Brute-force bucketed LRU of one (sequence, KV head)."""

    def __init__(self, num_slots: int) -> None:
        self.page_in: list[int | None] = [None] * num_slots
        self.touched = [0] * num_slots

    def admit(self, pages: list[int], step: int) -> tuple[list[int], list[bool], int]:
        slots: list[int] = [-1] * len(pages)
        missed = [False] * len(pages)
        for i, page in enumerate(pages):
            if page >= 0 and page in self.page_in:
                slots[i] = self.page_in.index(page)
        kept = {slot for slot in slots if slot >= 0}
        victims = [slot for slot in range(len(self.page_in)) if slot not in kept]
        victims.sort(key=lambda slot: (-self.age(slot, step), slot))
        evicted = 0
        for i, page in enumerate(pages):
            if page >= 0 and slots[i] < 0:
                slots[i], missed[i] = victims.pop(0), True
                evicted += self.page_in[slots[i]] is not None
                self.page_in[slots[i]] = page
        for slot in slots:
            if slot >= 0:
                self.touched[slot] = step
        return slots, missed, evicted

    def age(self, slot: int, step: int) -> int:
        return NUM_BUCKETS if self.page_in[slot] is None else min(step - self.touched[slot], NUM_BUCKETS - 1)


class Tables:
    """The tensors that the kernel works on."""

    def __init__(self, batch_size: int, num_heads: int, num_pages: int, num_slots: int) -> None:
        self.page_slot = torch.full((batch_size, num_heads, num_pages), -1, dtype=torch.int32)
        self.slot_page = torch.full((batch_size, num_heads, num_slots), -1, dtype=torch.int32)
        self.slot_step = torch.zeros((batch_size, num_heads, num_slots), dtype=torch.int64)

    def admit(self, pages: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        return admit_pages(self.page_slot, self.slot_page, self.slot_step, pages, step)


def compare(tables: Tables, models: list[list[Residency]], pages: list[list[list[int]]], step: int) -> None:
    slots, missed, evicted = tables.admit(torch.tensor(pages), step)
    total = 0
    for b, row in enumerate(models):
        for h, model in enumerate(row):
            want_slots, want_missed, gone = model.admit(pages[b][h], step)
            total += gone
            assert slots[b, h].tolist() == want_slots
            assert missed[b, h].tolist() == want_missed
            assert tables.slot_page[b, h].tolist() == [-1 if page is None else page for page in model.page_in]
            where = {page: slot for slot, page in enumerate(model.page_in) if page is not None}
            assert tables.page_slot[b, h].tolist() == [where.get(page, -1) for page in range(tables.page_slot.shape[2])]
            held = [slot for slot, page in enumerate(model.page_in) if page is not None]
            assert [int(tables.slot_step[b, h, slot]) for slot in held] == [model.touched[slot] for slot in held]
    assert evicted == total


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.data())
def test_random_traces(data: st.DataObject) -> None:
    """Several sequences and heads, each with requests of its own, -1 among them, and steps that jump."""
    batch_size, heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    num_pages, num_slots = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 8))
    tables = Tables(batch_size, heads, num_pages, num_slots)
    models = [[Residency(num_slots) for _ in range(heads)] for _ in range(batch_size)]
    width = data.draw(st.integers(1, num_slots))
    request = st.lists(st.integers(0, num_pages - 1), unique=True, max_size=min(width, num_pages))
    step = 0
    for _ in range(data.draw(st.integers(1, 12))):
        step += data.draw(st.sampled_from([0, 1, 1, 1, 2, 30, 62, 63, 64, 200]))
        pages = []
        for _ in range(batch_size):
            row = []
            for _ in range(heads):
                chosen = data.draw(request)
                row.append(data.draw(st.permutations(chosen + [-1] * (width - len(chosen)))))
            pages.append(row)
        compare(tables, models, pages, step)


def test_all_slots_at_once_and_none_at_all() -> None:
    tables, models = Tables(1, 1, 9, 3), [[Residency(3)]]
    for step, pages in enumerate([[0, 1, 2], [-1, -1, -1], [3, 4, 5], [5, 4, 3], [5, 8, 4], [-1, 0, -1]]):
        compare(tables, models, [[pages]], step)
    slots, missed, evicted = tables.admit(torch.empty((1, 1, 0), dtype=torch.int64), 9)
    assert slots.shape == missed.shape == (1, 1, 0)
    assert evicted == 0


@pytest.mark.parametrize("age", [NUM_BUCKETS - 2, NUM_BUCKETS - 1, NUM_BUCKETS, 1000])
def test_the_last_bucket_is_shared(age: int) -> None:
    """Two slots past the last bucket's edge are alike, so the lower number goes first, older or not."""
    tables = Tables(1, 1, 4, 2)
    tables.admit(torch.tensor([[[0]]]), 1)  # slot 0
    tables.admit(torch.tensor([[[1]]]), 2)  # slot 1
    tables.admit(torch.tensor([[[0]]]), 3)  # slot 0 is now the younger one
    slots, _, _ = tables.admit(torch.tensor([[[2]]]), 3 + age)
    assert int(slots) == (0 if age >= NUM_BUCKETS - 1 else 1)


def trace_with_locality(num_pages: int, width: int, steps: int, seed: int) -> list[list[int]]:
    """Requests as in decoding: most pages of a step are requested again at the next, a hot set returns, a tail is random."""
    rng = random.Random(seed)
    hot = rng.sample(range(num_pages), num_pages // 5)
    now = rng.sample(range(num_pages), width)
    trace = []
    for _ in range(steps):
        stay = [page for page in now if rng.random() < 0.85]
        while len(stay) < width:
            page = rng.choice(hot) if rng.random() < 0.7 else rng.randrange(num_pages)
            if page not in stay:
                stay.append(page)
        now = stay
        trace.append(now)
    return trace


def exact_lru_hit_rate(trace: list[list[int]], num_slots: int) -> float:
    """Hit rate of a cache that evicts the page with the oldest last touch; pages of one step in the order of the request."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for pages in trace:
        hits += sum(page in held for page in pages)
        for page in pages:
            held.pop(page, None)
            held[page] = None
        while len(held) > num_slots:
            held.popitem(last=False)
    return hits / sum(map(len, trace))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("num_pages", "width", "num_slots"), [(200, 16, 24), (200, 16, 60), (400, 32, 200), (100, 8, 8)]
)
def test_hit_rate_is_near_exact_lru(num_pages: int, width: int, num_slots: int, seed: int) -> None:
    """Within one point, though ages beyond the last bucket and pages of one step are not told apart."""
    trace = trace_with_locality(num_pages, width, 500, seed)
    tables = Tables(1, 1, num_pages, num_slots)
    hits = 0
    for step, pages in enumerate(trace):
        _, missed, _ = tables.admit(torch.tensor([[pages]]), step)
        hits += int((~missed).sum())
    bucketed, exact = hits / sum(map(len, trace)), exact_lru_hit_rate(trace, num_slots)
    assert exact > 0.5  # the traces have locality
    assert abs(bucketed - exact) <= 0.01
