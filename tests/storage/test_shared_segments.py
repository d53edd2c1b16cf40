"""Page tables that share segments: each reads its own tokens after any calls, and pools do not grow without need.

A `Ledger` is storage of one KV head with one token per page, in chunks that forks share by reference.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spin_hf.errors import CacheStateError
from spin_hf.storage.page_table import SEGMENT_PAGES, PageTable
from spin_hf.storage.segment_pool import segment_indices
from spin_hf.storage.shared_segments import SharedSegments

CPU = torch.device("cpu")
Chunk = dict[tuple[int, int], int]
"""(segment in the chunk, page in the segment) -> token."""


class Ledger:
    """See the docstring of this module. Chunks hold `each` segments."""

    def __init__(self, each: int, chunks: list[Chunk] | None = None) -> None:
        self.each, self.chunks, self.length = each, chunks or [], 0
        self.shares_rows = chunks is not None

    @property
    def capacity(self) -> int:
        return len(self.chunks) * self.each

    def check(self, batch_size: int, num_segments: int, num_pages: int) -> None:
        pass

    def reserve(self, batch_size: int, num_segments: int, num_pages: int, num_ids: int, num_expected: int) -> bool:
        before = len(self.chunks)
        while self.capacity < num_ids:
            self.chunks.append({})
        return len(self.chunks) > before

    def shrink(self, num_ids: int) -> None:
        self.chunks = self.chunks[: -(-num_ids // self.each)]

    def copy_segments(self, pairs: list[tuple[int, int]]) -> None:
        for source, copy in pairs:
            for page in range(SEGMENT_PAGES):
                token = self.chunks[source // self.each].get((source % self.each, page))
                if token is not None:
                    self.write(copy, page, token)

    def write(self, segment: int, page: int, token: int) -> None:
        self.chunks[segment // self.each][segment % self.each, page] = token

    def truncate(self, length: int) -> None:
        self.length = min(self.length, length)

    def select(self, rows: list[int]) -> None:
        pass

    def forget_resident(self, batch_size: int) -> None:
        pass

    def clear(self) -> None:
        self.length = 0

    def release(self) -> None:
        self.chunks = []

    def fork_rows(self, memo: dict[int, Any]) -> None:
        self.shares_rows = True
        memo[id(self)] = Ledger(self.each, list(self.chunks))


class Book:
    """A page table with two ledgers of different chunks, and the tokens that it must hold."""

    def __init__(self, table: PageTable | None = None, tokens: list[list[int]] | None = None) -> None:
        self.tokens: list[list[int]] = tokens or []
        self.table = table or PageTable(page_size=1)
        if table is None:
            for each in (2, 3):
                self.table.attach(Ledger(each))  # type: ignore[arg-type]

    @property
    def ledgers(self) -> list[Any]:
        return self.table.stores

    @property
    def length(self) -> int:
        return len(self.tokens[0]) if self.tokens else 0

    def append(self, rows: list[list[int]], fails: bool = False) -> None:
        """Tokens for every sequence. With `fails` the step is rolled back after they are written."""
        self.table.begin(len(rows), len(rows[0]), None)
        for row, new in enumerate(rows):
            for index, token in enumerate(new, self.table.start):
                segment = self.table.directory[row][index // SEGMENT_PAGES]
                assert self.table.shared.owns(segment)
                for ledger in self.ledgers:
                    ledger.write(segment, index % SEGMENT_PAGES, token)
        if fails:
            self.table.roll_back(self.length)
        else:
            self.tokens = [old + new for old, new in zip(self.tokens or [[] for _ in rows], rows, strict=True)]

    def fork(self) -> Book:
        memo: dict[int, Any] = {}
        twin = self.table.fork(memo)
        twin.stores = [memo[id(ledger)] for ledger in self.ledgers]
        return Book(twin, list(self.tokens))

    def check(self) -> None:
        self.table.check_integrity()
        assert self.table.length == self.length
        if not self.length:
            return
        rows = self.table.page_rows(1, CPU)[:, 0, : self.length].tolist()
        for ledger in self.ledgers:
            for row, expected in zip(rows, self.tokens, strict=True):
                places = [divmod(place, SEGMENT_PAGES) for place in row]
                found = [ledger.chunks[segment // ledger.each][segment % ledger.each, page] for segment, page in places]
                assert found == expected


def book_and_fork(num_tokens: int) -> tuple[Book, Book]:
    book = Book()
    book.append([list(range(num_tokens))])
    return book, book.fork()


def held(books: list[Book]) -> int:
    """Different segments in use, in the first ledgers."""
    used = {
        (id(book.ledgers[0].chunks[segment // 2]), segment % 2)
        for book in books
        for row in book.table.directory
        for segment in row
    }
    return len(used)


@settings(deadline=None, derandomize=True, max_examples=400)
@given(st.data())
def test_random_families(data: st.DataObject) -> None:
    books, fresh = [Book()], iter(range(10**7))
    actions = [
        "append", "append", "fail", "fork", "fork", "truncate", "select", "own", "clear", "release", "delete", "copy",
    ]  # fmt: skip
    for _ in range(data.draw(st.integers(4, 30))):
        book = books[data.draw(st.integers(0, len(books) - 1))]  # hypothesis keeps what it draws
        action = data.draw(st.sampled_from(actions))
        if action in ("append", "fail"):
            rows = len(book.tokens) or data.draw(st.integers(1, 2))
            count = data.draw(st.sampled_from([1, 1, 5, 31, 32, 70]))
            book.append([[next(fresh) for _ in range(count)] for _ in range(rows)], fails=action == "fail")
        elif action == "fork" and len(books) < 5:
            books.append(book.fork())
        elif action == "truncate" and book.tokens:
            keep = data.draw(st.integers(0, book.length))
            book.table.truncate(keep)
            book.tokens = [row[:keep] for row in book.tokens] if keep else []
            if not keep:
                book.table.clear()
        elif action == "select" and book.tokens:
            order = data.draw(st.lists(st.integers(0, len(book.tokens) - 1), min_size=1, max_size=3))
            book.table.select(order)
            book.tokens = [book.tokens[row] for row in order]
        elif action == "own" and book.tokens:
            pages = range(data.draw(st.integers(0, book.length - 1)), book.length)
            book.table.own(pages)
            indices = segment_indices(pages.start, pages.stop)
            assert all(book.table.shared.owns(row[index]) for row in book.table.directory for index in indices)
        elif action in ("clear", "release"):
            book.table.clear()
            book.tokens = []
            if action == "release":
                book.table.release()
                assert not book.table.shared
        elif action == "delete" and len(books) > 1:
            books.remove(book)
            del book
        elif action == "copy" and len(books) < 5:
            twin = deepcopy(book.table)
            assert not twin.shared
            books.append(Book(twin, list(book.tokens)))
        for each in books:
            each.check()
        book = each = books[0]
    del books[1:]
    book.append([[next(fresh)] * 40 for _ in range(len(book.tokens) or 1)])
    book.table.settle_forks()
    assert not book.table.shared, "all segments are the survivor's again"
    book.check()


def test_only_what_is_written_is_copied() -> None:
    book = Book()
    book.append([list(range(5 * SEGMENT_PAGES + 3))])
    forks = [book.fork() for _ in range(4)]
    assert held([book, *forks]) == 6
    for number, fork in enumerate(forks, 1):
        fork.append([[-number]])
        assert held([book, *forks]) == 6 + number
    forks[0].append([[1] * SEGMENT_PAGES])
    assert held([book, *forks]) == 11
    for each in (book, *forks):
        each.check()


def test_segments_of_a_fork_that_ended_are_used_again() -> None:
    book = Book()
    book.append([list(range(70))])
    for _ in range(20):
        fork = book.fork()
        fork.append([[1] * 40])
        book.append([[2]])
        del fork
    assert len(book.table.refcounts) <= 8
    book.check()


def test_segments_that_one_side_leaves_go_to_the_other() -> None:
    """The pool of a survivor grows only when nothing is left in the chunks that it sees."""
    book, fork = book_and_fork(6 * SEGMENT_PAGES)
    book.table.clear()
    book.tokens = []
    fork.append([[1]])  # the seventh segment
    fork.table.truncate(3)
    fork.tokens = [row[:3] for row in fork.tokens]
    fork.append([[2]])
    book.append([[3] * 5 * SEGMENT_PAGES])
    assert len(book.table.refcounts) <= 7
    for each in (book, fork):
        each.check()


def test_a_table_with_its_own_rows_leaves() -> None:
    """Such as after a conversion of its pages. Each side then has a pool of its own."""
    book, fork = book_and_fork(70)
    for ledger in book.ledgers:
        ledger.chunks, ledger.shares_rows = deepcopy(ledger.chunks), False
    book.table.settle_forks()
    assert not book.table.shared
    before = fork.table.directory
    fork.append([[1]])
    assert fork.table.directory == before, "what nobody else uses was copied"
    book.append([[2]])
    for each in (book, fork):
        each.check()


def test_a_copy_is_undone_with_its_step() -> None:
    """The old segment is still held and unchanged."""
    book, fork = book_and_fork(40)
    before = book.table.directory
    book.append([[7]], fails=True)
    assert book.table.directory == before
    fork.append([[8]])
    for each in (book, fork):
        each.check()


def test_a_dropped_segment_is_published_by_the_next_step() -> None:
    """Also by a step that needs no segment. The fork then holds the segment alone and does not copy it."""
    book, fork = book_and_fork(70)
    book.append([[1]])  # in a copy of the last segment
    book.append([[2]])
    before = fork.table.directory
    fork.append([[3]])
    assert fork.table.directory == before
    for each in (book, fork):
        each.check()


@pytest.mark.parametrize("damage", ["holder", "member", "free"])
def test_integrity_notices(damage: str) -> None:
    book, fork = book_and_fork(40)
    shares: Any = book.table.shared
    share = shares._shares[book.table.directory[0][0]]
    if damage == "holder":
        share.holders.discard(shares._table)
    elif damage == "member":
        share.members.discard(fork.table.shared._table)
    else:
        book.table.free.append(book.table.directory[0][0])
    with pytest.raises(CacheStateError, match="integrity"):
        book.table.check_integrity()


def test_a_table_without_forks_shares_nothing() -> None:
    shared = SharedSegments()
    assert not shared
    assert shared.owns(3)
    assert shared.claim([0, 0]) is None
    assert shared.unused([0, 0]) == 0
