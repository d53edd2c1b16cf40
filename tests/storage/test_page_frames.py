"""PageFrames: whatever is brought in, written, resized, forgotten or moved, a page reads as its home does.

The expected contents are one number per page and sequence; `bring_in` must return them, and count its hits and loads.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spin_hf.errors import CacheStateError
from spin_hf.storage.chunked import ChunkedArray
from spin_hf.storage.residency import PageFrames

HEADS, PAGE_SIZE, KEY_DIM, VALUE_DIM = 2, 4, 3, 2
ELEMENTS = PAGE_SIZE * (KEY_DIM + VALUE_DIM)
NUM_PAGES = 10


class World:
    """Frames and their home; the pages of row b lie at rows (b * HEADS + h) * NUM_PAGES + p."""

    def __init__(self, batch_size: int, num_slots: int) -> None:
        self.home = ChunkedArray((ELEMENTS,), 16, torch.float32, torch.device("cpu"))
        self.home.grow(4 * HEADS * NUM_PAGES)
        self.home.put(torch.arange(self.home.num_rows), torch.randn(self.home.num_rows, ELEMENTS))
        self.frames = PageFrames(HEADS, ELEMENTS, torch.float32, torch.device("cpu"))
        self.frames.resize(batch_size, num_slots, NUM_PAGES)
        self.owners = list(range(batch_size))
        self.step = 0

    def rows(self) -> torch.Tensor:
        owners = torch.tensor(self.owners).view(-1, 1, 1)
        return (owners * HEADS + torch.arange(HEADS).view(1, -1, 1)) * NUM_PAGES + torch.arange(NUM_PAGES)

    def bring_in(self, pages: torch.Tensor) -> None:
        self.step += 1
        rows = self.rows().gather(2, pages.clamp(min=0))
        content = self.frames.bring_in(pages, rows, self.home.take, self.step)
        wanted = pages >= 0
        assert torch.equal(content[wanted], self.home.take(rows)[wanted])

    def write(self, page: int, offset: int, count: int) -> None:
        """New tokens go to the home and to the frames."""
        keys, values = (
            torch.randn(len(self.owners), HEADS, count, KEY_DIM),
            torch.randn(len(self.owners), HEADS, count, VALUE_DIM),
        )
        rows = self.rows()[:, :, page]
        content = self.home.take(rows)
        for b in range(rows.shape[0]):
            for h in range(HEADS):
                for i in range(count):
                    token = offset + i
                    content[b, h, token * KEY_DIM : (token + 1) * KEY_DIM] = keys[b, h, i]
                    first = PAGE_SIZE * KEY_DIM + token * VALUE_DIM
                    content[b, h, first : first + VALUE_DIM] = values[b, h, i]
        self.home.put(rows, content)
        self.frames.write(page, offset, keys, values)

    def check(self) -> None:
        everything = torch.ones((1, NUM_PAGES, ELEMENTS), dtype=torch.bool)
        self.frames.check_integrity(NUM_PAGES, self.rows(), self.home.take, everything)

    def resident(self) -> list[list[set[int]]]:
        return [[{page for page in head if page >= 0} for head in row] for row in self.frames.slot_page.tolist()]


@settings(deadline=None, derandomize=True, max_examples=120)
@given(st.data())
def test_random_histories(data: st.DataObject) -> None:
    torch.manual_seed(0)
    world = World(data.draw(st.integers(1, 3)), data.draw(st.integers(2, 6)))
    for _ in range(data.draw(st.integers(2, 10))):
        action = data.draw(st.sampled_from(["bring", "bring", "bring", "write", "resize", "forget", "select", "clear"]))
        batch_size, slots = len(world.owners), world.frames.num_slots
        if action == "bring":
            width = data.draw(st.integers(1, slots))
            pages = torch.stack([torch.randperm(NUM_PAGES)[:width] for _ in range(batch_size * HEADS)])
            pages[torch.rand(pages.shape) < 0.2] = -1
            world.bring_in(pages.view(batch_size, HEADS, width))
        elif action == "write":
            offset = data.draw(st.integers(0, PAGE_SIZE - 1))
            world.write(data.draw(st.integers(0, NUM_PAGES - 1)), offset, data.draw(st.integers(1, PAGE_SIZE - offset)))
        elif action == "resize":
            world.frames.resize(batch_size, data.draw(st.integers(2, 8)), NUM_PAGES)
        elif action == "forget":
            page = data.draw(st.integers(0, NUM_PAGES))
            world.frames.forget_from(page)
            assert all(held < page for row in world.resident() for head in row for held in head)
        elif action == "select":
            order = data.draw(st.lists(st.integers(0, batch_size - 1), min_size=1, max_size=4, unique=True))
            world.frames.select(order)
            world.owners = [world.owners[i] for i in order]
        else:
            world.frames.forget_all()
            assert not any(held for row in world.resident() for held in row)
        world.check()
        assert world.frames.slot_page.shape == (len(world.owners), HEADS, world.frames.num_slots)


def test_counts() -> None:
    world = World(1, 3)
    for pages, hits, loads, evictions in [
        ([0, 1, -1], 0, 2, 0),
        ([1, 2, 0], 2, 1, 0),
        ([3, -1, 1], 1, 1, 1),
        ([-1, -1, -1], 0, 0, 0),
    ]:
        before = world.frames.hits, world.frames.loads, world.frames.evictions
        world.bring_in(torch.tensor([[pages] * HEADS]))
        after = world.frames.hits, world.frames.loads, world.frames.evictions
        assert [b - a for a, b in zip(before, after, strict=True)] == [HEADS * hits, HEADS * loads, HEADS * evictions]


def test_resize_keeps_the_first_slots() -> None:
    world = World(2, 4)
    world.bring_in(torch.tensor([5, 6, 7, 8]).expand(2, HEADS, 4))
    world.frames.resize(2, 2, NUM_PAGES)
    assert world.resident() == [[{5, 6}] * HEADS] * 2
    world.frames.resize(2, 6, NUM_PAGES)
    assert world.resident() == [[{5, 6}] * HEADS] * 2
    loads = world.frames.loads
    world.bring_in(torch.tensor([6, 5]).expand(2, HEADS, 2))
    assert world.frames.loads == loads
    world.frames.resize(3, 6, NUM_PAGES)  # another batch: all are forgotten
    assert world.resident() == [[set()] * HEADS] * 3


def test_resize_extends_the_table() -> None:
    world = World(1, 4)
    world.bring_in(torch.tensor([[[9, 3]] * HEADS]))
    for num_pages in (11, 12, 100):
        world.frames.resize(1, 4, num_pages)
        assert world.frames.page_slot.shape[2] >= num_pages
        assert world.resident() == [[{9, 3}] * HEADS]
    world.check()


def test_select_keeps_only_who_stays() -> None:
    world = World(3, 4)
    world.bring_in(torch.tensor([1, 2]).expand(3, HEADS, 2))
    world.frames.select([0, 2, 2])
    assert world.resident() == [[{1, 2}] * HEADS, [set()] * HEADS, [{1, 2}] * HEADS]


@pytest.mark.parametrize("damage", ["content", "page_slot", "slot_page"])
def test_integrity_notices(damage: str) -> None:
    """The check itself can fail."""
    world = World(1, 4)
    world.bring_in(torch.tensor([[[1, 2]] * HEADS]))
    world.check()
    if damage == "content":
        world.frames.frames[int(world.frames.page_slot[0, 0, 1]), 0] += 1.0
    elif damage == "page_slot":
        world.frames.page_slot[0, 0, 7] = 0
    else:
        world.frames.slot_page[0, 0, 3] = 7
    with pytest.raises(CacheStateError, match="integrity"):
        world.check()
