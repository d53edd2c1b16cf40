"""The index of prefixes: longest matches against brute force, eviction in order of use, several processes, kills."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spin_hf.persistence.prefix_index import IndexFormatError, PrefixIndex
from tests.support import fork_server

BLOCK = 4
CONTEXT = fork_server.context()


@pytest.fixture(params=["file", "memory"])
def index(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PrefixIndex]:
    made = PrefixIndex(None if request.param == "memory" else tmp_path / "index.sqlite", BLOCK)
    yield made
    made.close()


def shared_blocks(a: list[int], b: list[int]) -> int:
    """Tokens of the whole blocks that both begin with."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return same // BLOCK * BLOCK


def test_longest_match(index: PrefixIndex) -> None:
    """Against brute force, on texts of few different tokens that branch often."""
    draw = random.Random(0)
    texts: dict[str, list[int]] = {}
    for number in range(120):
        if texts and draw.random() < 0.7:
            origin = draw.choice(list(texts.values()))
            text = origin[: draw.randrange(len(origin) + 1)] + [draw.randrange(3) for _ in range(draw.randrange(20))]
        else:
            text = [draw.randrange(3) for _ in range(draw.randrange(1, 40))]
        texts[f"entry {number}"] = text
        index.insert(f"entry {number}", "model", text, 1)
    hits = 0
    for _ in range(300):
        origin = draw.choice(list(texts.values()))
        prompt = origin[: draw.randrange(len(origin) + 1)] + [draw.randrange(3) for _ in range(draw.randrange(30))]
        best = max(shared_blocks(prompt, text) for text in texts.values())
        found = index.find("model", prompt, most=200)
        assert {match.shared for match in found} == ({best} if best else set())
        assert {match.name for match in found} == {
            name for name, text in texts.items() if best and shared_blocks(prompt, text) == best
        }
        assert all(match.num_tokens == len(texts[match.name]) for match in found)
        hits += bool(found)
    assert 50 < hits < 300


def test_spaces_and_positions_do_not_mix(index: PrefixIndex) -> None:
    index.insert("a", "one", [1, 2, 3, 4, 5, 6, 7, 8], 1)
    assert [match.shared for match in index.find("one", [1, 2, 3, 4, 5, 6, 7, 8, 9])] == [8]
    assert not index.find("two", [1, 2, 3, 4, 5, 6, 7, 8])
    assert not index.find("one", [5, 6, 7, 8]), "the second block of a text does not begin one"
    assert not index.find("one", [1, 2, 3])
    assert not index.find("one", [])


def test_the_last_used_comes_first_and_the_least_used_goes_first(index: PrefixIndex) -> None:
    for number in range(5):
        index.insert(f"{number}", "model", [1, 2, 3, 4, number], 10)
    index.touch("0")
    assert [match.name for match in index.find("model", [1, 2, 3, 4])] == ["0", "4", "3", "2"]
    assert index.num_bytes == 50
    assert index.remove_beyond(30) == ["1", "2"]
    assert index.names() == ["3", "4", "0"]
    assert index.remove_beyond(9, keep="3") == ["4", "0", "3"]
    assert not index.find("model", [1, 2, 3, 4])


def test_an_entry_is_replaced_and_removed_once(index: PrefixIndex) -> None:
    index.insert("a", "model", [1, 2, 3, 4], 10)
    index.insert("a", "model", [5, 6, 7, 8], 20)
    assert not index.find("model", [1, 2, 3, 4])
    assert index.num_bytes == 20
    assert [index.remove("a"), index.remove("a")] == [True, False]


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database, but long enough to be taken for the head of one: " * 20)
    with pytest.raises(IndexFormatError, match="SQLite cannot read"):
        PrefixIndex(tmp_path / "text")
    connection = sqlite3.connect(tmp_path / "later")
    connection.execute("PRAGMA user_version=7")
    connection.close()
    with pytest.raises(IndexFormatError, match="version 7"):
        PrefixIndex(tmp_path / "later")


def _work(file: Path, number: int, seconds: float) -> None:
    """Insert, find, evict and remove until the time is over or somebody kills this process."""
    index, draw, stop = PrefixIndex(file, BLOCK), random.Random(number), time.monotonic() + seconds
    turn = 0
    while time.monotonic() < stop:
        turn += 1
        text = [draw.randrange(2) for _ in range(24)]
        index.insert(f"{number} {turn % 50}", "model", text, 10)
        assert all(match.shared <= 24 for match in index.find("model", text))
        index.remove_beyond(400)
        index.remove(f"{draw.randrange(8)} {draw.randrange(50)}")


def assert_sound(file: Path) -> None:
    """Every block belongs to an entry, every entry has its blocks, and the file itself is whole."""
    with sqlite3.connect(file) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert not connection.execute("SELECT 1 FROM blocks WHERE entry NOT IN (SELECT id FROM entries)").fetchall()
        counts = connection.execute(
            "SELECT num_tokens, (SELECT COUNT(*) FROM blocks WHERE entry = entries.id) FROM entries"
        ).fetchall()
    assert all(blocks == tokens // BLOCK for tokens, blocks in counts)


@pytest.mark.parametrize("processes", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_several_processes_at_once(processes: int, tmp_path: Path) -> None:
    file, seconds = tmp_path / "index.sqlite", 1.0 if processes == 2 else 20.0
    running = [CONTEXT.Process(target=_work, args=(file, number, seconds)) for number in range(processes)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0] * processes
    assert_sound(file)
    assert PrefixIndex(file, BLOCK).num_bytes <= 400


@pytest.mark.parametrize("kills", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_killed_processes_lock_nothing(kills: int, tmp_path: Path) -> None:
    file, draw = tmp_path / "index.sqlite", random.Random(0)
    PrefixIndex(file, BLOCK).close()
    running = [CONTEXT.Process(target=_work, args=(file, number, 3600.0)) for number in range(2)]
    for process in running:
        process.start()
    deadline = time.monotonic() + 60
    while not PrefixIndex(file, BLOCK).names() and time.monotonic() < deadline:
        time.sleep(0.05)
    for kill in range(kills):
        time.sleep(draw.random() * 0.1)
        victim = running[kill % 2]
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
        began = time.monotonic()
        index = PrefixIndex(file, BLOCK)
        index.insert("mine", "model", [1, 2, 3, 4], 10)
        assert index.find("model", [1, 2, 3, 4])
        index.close()
        assert time.monotonic() - began < 5
        assert_sound(file)
        running[kill % 2] = CONTEXT.Process(target=_work, args=(file, kill % 2, 3600.0))
        running[kill % 2].start()
    for process in running:
        process.kill()
        process.join()


def test_a_long_prompt_among_many_is_found_quickly() -> None:
    """128K tokens among 1,000 entries; most of the time is hashing."""
    index, draw = PrefixIndex(None), random.Random(0)
    common = [draw.randrange(100_000) for _ in range(131_072)]
    for number in range(1000):
        index.insert(f"{number}", "model", common[: 256 * (number % 512)] + [number] * 256, 1)
    index.insert("whole", "model", common, 1)
    found = index.find("model", [*common, 1, 2, 3])
    assert (found[0].name, found[0].shared) == ("whole", 131_072)


def test_opened_at_once_for_the_first_time(tmp_path: Path) -> None:
    """Each connection turns the new file to write-ahead logging. SQLite does not wait for the others then."""
    together, errors = threading.Barrier(6), list[BaseException]()

    def opens() -> None:
        for number in range(40):
            together.wait(60)
            try:
                PrefixIndex(tmp_path / f"{number}.sqlite").close()
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=opens) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
