"""PageFrames: after pages are brought in, written, resized, forgotten or moved, each reads as in the backing store.

The expected contents are one number per page and sequence. `bring_in` must return them, and count its hits and loads.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spin_hf.errors import CacheStateError, CapacityError
from spin_hf.storage.chunked_array import ChunkedArray
from spin_hf.storage.page_frames import PageFrames

HEADS, PAGE_SIZE, KEY_DIM, VALUE_DIM = 2, 4, 3, 2
ELEMENTS = PAGE_SIZE * (KEY_DIM + VALUE_DIM)
NUM_PAGES = 10


class World:
    """Frames and their backing store; the pages of row b are at rows (b * HEADS + h) * NUM_PAGES + p."""

    def __init__(self, batch_size: int, num_slots: int) -> None:
        self.backing = ChunkedArray((ELEMENTS,), 16, torch.float32, torch.device("cpu"))
        self.backing.grow(4 * HEADS * NUM_PAGES)
        self.backing.put(torch.arange(self.backing.num_rows), torch.randn(self.backing.num_rows, ELEMENTS))
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
        content = self.frames.bring_in(pages, rows, self.backing.take, self.step)
        wanted = pages >= 0
        assert torch.equal(content[wanted], self.backing.take(rows)[wanted])

    def write(self, page: int, offset: int, count: int) -> None:
        """New tokens go to the backing store and to the frames."""
        keys, values = (
            torch.randn(len(self.owners), HEADS, count, KEY_DIM),
            torch.randn(len(self.owners), HEADS, count, VALUE_DIM),
        )
        rows = self.rows()[:, :, page]
        content = self.backing.take(rows)
        for b in range(rows.shape[0]):
            for h in range(HEADS):
                for i in range(count):
                    token = offset + i
                    content[b, h, token * KEY_DIM : (token + 1) * KEY_DIM] = keys[b, h, i]
                    first = PAGE_SIZE * KEY_DIM + token * VALUE_DIM
                    content[b, h, first : first + VALUE_DIM] = values[b, h, i]
        self.backing.put(rows, content)
        self.frames.write(page, offset, keys, values)

    def check(self) -> None:
        everything = torch.ones((1, NUM_PAGES, ELEMENTS), dtype=torch.bool)
        self.frames.check_integrity(NUM_PAGES, self.rows(), self.backing.take, everything)

    def resident(self) -> list[list[set[int]]]:
        held = [self.frames.held(row).tolist() for row in range(len(self.owners))]
        return [[{page for page in head if page >= 0} for head in row] for row in held]

    def last_touched(self, row: int, head: int, count: int) -> set[int]:
        """Of the pages in a sequence's slots, those touched last; by the tables, whose oldest slots go first among equals."""
        first = HEADS * sum(self.frames.slots[:row]) + head * self.frames.slots[row]
        slots = range(first, first + self.frames.slots[row])
        held = [(-int(self.frames.slot_step[s]), s, int(self.frames.slot_page[s])) for s in slots]
        return {page for _, _, page in sorted(entry for entry in held if entry[2] >= 0)[:count]}


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
            slots = data.draw(st.lists(st.integers(2, 8), min_size=batch_size, max_size=batch_size))
            slots = data.draw(st.sampled_from([slots, slots[:1] * batch_size]))
            kept = [[world.last_touched(b, h, slots[b]) for h in range(HEADS)] for b in range(batch_size)]
            world.frames.resize(batch_size, slots, NUM_PAGES)
            assert world.resident() == kept
        elif action == "forget":
            page = data.draw(st.integers(0, NUM_PAGES))
            world.frames.forget_from(page)
            assert all(held < page for row in world.resident() for head in row for held in head)
        elif action == "select":
            order = data.draw(st.lists(st.integers(0, batch_size - 1), min_size=1, max_size=4, unique=True))
            slots = world.frames.slots
            world.frames.select(order)
            if len(order) != batch_size:
                assert world.frames.frames.numel() == 0  # until it is known what there is room for
                world.frames.resize(len(order), [slots[i] for i in order], NUM_PAGES)
            world.owners = [world.owners[i] for i in order]
        else:
            world.frames.forget_all()
            assert not any(held for row in world.resident() for held in row)
        world.check()
        assert len(world.frames.slots) == len(world.owners)
        assert world.frames.frames.shape == (HEADS * sum(world.frames.slots), ELEMENTS)


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


def test_resize_keeps_what_was_touched_last() -> None:
    world = World(2, 4)
    world.bring_in(torch.tensor([5, 6, 7, 8]).expand(2, HEADS, 4))
    world.bring_in(torch.tensor([8, 6]).expand(2, HEADS, 2))
    world.frames.resize(2, 2, NUM_PAGES)
    assert world.resident() == [[{6, 8}] * HEADS] * 2
    world.frames.resize(2, 6, NUM_PAGES)
    assert world.resident() == [[{6, 8}] * HEADS] * 2
    loads = world.frames.loads
    world.bring_in(torch.tensor([6, 8]).expand(2, HEADS, 2))
    assert world.frames.loads == loads
    world.frames.resize(3, 6, NUM_PAGES)  # another batch: all are forgotten
    world.owners = [0, 1, 2]
    assert world.resident() == [[set()] * HEADS] * 3


def test_sequences_with_slots_of_their_own() -> None:
    world = World(3, 6)
    for pages in ([5, 6, 7], [1, 2, 3]):
        world.bring_in(torch.tensor(pages).expand(3, HEADS, 3))
    world.frames.resize(3, [2, 6, 4], NUM_PAGES)
    assert world.resident() == [[{1, 2}] * HEADS, [{1, 2, 3, 5, 6, 7}] * HEADS, [{1, 2, 3, 5}] * HEADS]
    world.bring_in(torch.tensor([[9, 8, -1, -1], [9, 8, 7, 6], [9, 8, 7, -1]]).unsqueeze(1).expand(3, HEADS, 4))
    assert [{9, 8} <= held for (held, _) in world.resident()] == [True] * 3
    world.check()


@pytest.mark.parametrize("slots", [2, 3, 8])
def test_resize_without_memory_for_a_copy(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was resident is given up; if even that is not enough there are as many slots as before."""
    world = World(2, 4)
    world.bring_in(torch.tensor([5, 6, 7, 8]).expand(2, HEADS, 4))
    real, limit = PageFrames._move_slots, 4 * HEADS * 2

    def move(frames: PageFrames, wanted: tuple[int, ...]) -> None:
        if frames.frames.shape[0] + HEADS * sum(wanted) > limit:
            raise torch.OutOfMemoryError("as many as there were")
        real(frames, wanted)

    monkeypatch.setattr(PageFrames, "_move_slots", move)
    if slots > 4:
        with pytest.raises(CapacityError):
            world.frames.resize(2, slots, NUM_PAGES)
    else:
        world.frames.resize(2, slots, NUM_PAGES)
    assert world.frames.slots == (min(4, slots),) * 2
    world.check()
    world.bring_in(torch.tensor([5, 6]).expand(2, HEADS, 2))
    world.check()


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
        world.frames.held(0)[0, 3] = 7
    with pytest.raises(CacheStateError, match="integrity"):
        world.check()
