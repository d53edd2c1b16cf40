"""PageTable: the page table and its sharing, against one plain list of tokens per sequence.

A `Notebook` replaces a layer's storage: it stores, by segment and page, the token that was written there. After any history
each sequence must read its own tokens, whatever it shares with others.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spin_hf.errors import BatchSizeError, BudgetError, CacheStateError
from spin_hf.storage.page_table import SEGMENT_PAGES, PageTable

CPU = torch.device("cpu")


class Notebook:
    """Storage of one KV head with one token per page."""

    def __init__(self) -> None:
        self.pages: dict[tuple[int, int], int] = {}
        self.length = 0
        self.room = 10**9
        self.calls: list[str] = []

    def check(self, batch_size: int, num_segments: int, num_pages: int) -> None:
        if num_segments > self.room:
            raise BudgetError("no room")

    def reserve(self, batch_size: int, num_segments: int, num_pages: int, num_ids: int, num_expected: int) -> bool:
        self.calls.append("reserve")
        return True

    def shrink(self, num_segments: int) -> None:
        pass

    def copy_segments(self, pairs: list[tuple[int, int]]) -> None:
        for source, destination in pairs:
            for page in range(SEGMENT_PAGES):
                self.pages.pop((destination, page), None)
                if (source, page) in self.pages:
                    self.pages[destination, page] = self.pages[source, page]

    def truncate(self, length: int) -> None:
        self.length = min(self.length, length)

    def select(self, rows: list[int]) -> None:
        self.calls.append("select")

    def forget_resident(self, batch_size: int) -> None:
        pass

    def clear(self) -> None:
        self.length = 0


def write(sequences: PageTable, book: Notebook, tokens: list[list[int]]) -> None:
    """Append tokens [B][n] as a layer would."""
    sequences.begin(len(tokens), len(tokens[0]), None)
    for row, new in enumerate(tokens):
        for i, token in enumerate(new):
            page = sequences.start + i
            book.pages[sequences.directory[row][page // SEGMENT_PAGES], page % SEGMENT_PAGES] = token
    book.length = sequences.length


def read(sequences: PageTable, book: Notebook) -> list[list[int]]:
    """All tokens of all sequences, by the rows that `page_rows` gives."""
    rows = sequences.page_rows(1, CPU)[:, 0, : sequences.length].tolist()
    return [[book.pages[divmod(row, SEGMENT_PAGES)] for row in sequence] for sequence in rows]


def new_pair() -> tuple[PageTable, Notebook]:
    sequences, book = PageTable(page_size=1), Notebook()
    sequences.attach(book)
    return sequences, book


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.data())
def test_random_histories(data: st.DataObject) -> None:
    sequences, book = new_pair()
    expected: list[list[int]] = []
    fresh = iter(range(10**6))
    for _ in range(data.draw(st.integers(2, 14))):
        action = data.draw(st.sampled_from(["append", "append", "append", "select", "truncate", "unshare", "clear"]))
        length = len(expected[0]) if expected else 0
        if action == "append":
            rows = len(expected) if length else data.draw(st.integers(1, 3))
            count = data.draw(st.sampled_from([1, 1, 2, 31, 32, 33, 70]))
            new = [[next(fresh) for _ in range(count)] for _ in range(rows)]
            write(sequences, book, new)
            expected = [old + more for old, more in zip(expected if length else [[]] * rows, new, strict=True)]
        elif action == "select" and expected:
            order = data.draw(st.lists(st.integers(0, len(expected) - 1), min_size=1, max_size=4))
            sequences.select(order)
            expected = [list(expected[row]) for row in order]
        elif action == "truncate" and expected:
            keep = data.draw(st.integers(0, length))
            sequences.truncate(keep)
            expected = [row[:keep] for row in expected]
        elif action == "unshare" and length:
            rows = data.draw(st.lists(st.integers(0, len(expected) - 1), min_size=1, unique=True))
            page = data.draw(st.integers(0, length - 1))
            before = [row[page // SEGMENT_PAGES] for row in sequences.directory]
            sequences.unshare(rows, range(page, data.draw(st.integers(page + 1, length))))
            after = [row[page // SEGMENT_PAGES] for row in sequences.directory]
            assert not {after[row] for row in rows} & {after[row] for row in range(len(after)) if row not in rows}
            assert len({after[row] for row in rows}) == len({before[row] for row in rows})
        elif action == "clear":
            sequences.clear()
            expected = []
        sequences.check_integrity()
        assert sequences.length == (len(expected[0]) if expected else 0)
        if sequences.length:
            assert read(sequences, book) == expected


def test_a_common_past_is_stored_once() -> None:
    """Selection copies nothing; a write copies only the segment that it touches, and only for all owners but one."""
    sequences, book = new_pair()
    write(sequences, book, [list(range(2 * SEGMENT_PAGES + 5))])
    sequences.select([0, 0, 0])
    assert sequences.segments_in_use == 3
    write(sequences, book, [[-1], [-2], [-3]])
    assert sequences.segments_in_use == 5  # two shared, the last three times
    assert [len({row[i] for row in sequences.directory}) for i in range(3)] == [1, 1, 3]
    sequences.select([1])
    assert sequences.segments_in_use == 3
    assert read(sequences, book)[0][-1] == -2


def test_memory_is_used_again() -> None:
    sequences, book = new_pair()
    for _ in range(5):
        write(sequences, book, [list(range(3 * SEGMENT_PAGES))] * 2)
        sequences.clear()
    assert len(sequences.refcounts) == 6
    assert sequences.segments_in_use == 0


def test_page_rows() -> None:
    """(directory[b][p // S] * H + h) * S + p % S, for every page."""
    sequences, book = new_pair()
    write(sequences, book, [list(range(SEGMENT_PAGES + 1))] * 2)
    rows = sequences.page_rows(3, CPU)
    for b in range(2):
        for h in range(3):
            for p in range(sequences.num_pages):
                segment = sequences.directory[b][p // SEGMENT_PAGES]
                assert int(rows[b, h, p]) == (segment * 3 + h) * SEGMENT_PAGES + p % SEGMENT_PAGES
    assert int(rows.max()) < len(sequences.refcounts) * 3 * SEGMENT_PAGES
    assert rows.unique().numel() == rows.numel()


def state(sequences: PageTable) -> tuple[object, ...]:
    return (
        [list(row) for row in sequences.directory], list(sequences.refcounts), sorted(sequences.free),
        sequences.start, sequences.length, sequences.mask.valid,
    )  # fmt: skip


@pytest.mark.parametrize("error", [False, True])
def test_memory_has_changed_unless_every_store_denies_it(error: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptors hold addresses. A segment in memory that is allocated leaves them as they are."""
    sequences, book = new_pair()
    write(sequences, book, [list(range(SEGMENT_PAGES))])

    def reserve(*room: int) -> bool:
        if error:
            raise BudgetError("in the middle of an allocation")
        return False

    monkeypatch.setattr(book, "reserve", reserve)
    before = sequences.memory_version
    with pytest.raises(BudgetError) if error else nullcontext():
        sequences.begin(1, 1, None)
    assert sequences.memory_version == before + error


def test_no_room_changes_nothing() -> None:
    sequences, book = new_pair()
    write(sequences, book, [list(range(20))])
    sequences.select([0, 0])
    before, content = state(sequences), dict(book.pages)
    book.room = len(sequences.refcounts)
    with pytest.raises(BudgetError):
        sequences.begin(2, 1, None)
    assert state(sequences) == before
    assert book.pages == content
    sequences.check_integrity()


def test_wrong_batches_change_nothing() -> None:
    sequences, book = new_pair()
    write(sequences, book, [[1], [2]])
    before = state(sequences)
    with pytest.raises(BatchSizeError, match="2 sequences"):
        sequences.begin(3, 1, None)
    for rows in ([0, 2], [-1], [0, 1, 5]):
        with pytest.raises(BatchSizeError):
            sequences.select(rows)
    assert state(sequences) == before


@pytest.mark.parametrize("damage", ["refcounts", "free", "directory", "mask"])
def test_integrity_notices(damage: str) -> None:
    """The check itself can fail."""
    sequences, book = new_pair()
    write(sequences, book, [list(range(40))] * 2)
    sequences.truncate(20)
    sequences.check_integrity()
    if damage == "refcounts":
        sequences.refcounts[sequences.directory[0][0]] += 1
    elif damage == "free":
        sequences.free.pop()
    elif damage == "directory":
        sequences.directory[0] = []
    else:
        sequences.mask = replace(sequences.mask, valid=torch.ones((2, 19), dtype=torch.bool))
    with pytest.raises(CacheStateError, match="integrity"):
        sequences.check_integrity()
