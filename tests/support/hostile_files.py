"""Changes of saved caches: damage, and hostile files whose digests and checksums match."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spin_hf.persistence.checksum import piece_checksum
from tests.support.gate_files import header_and_tensors, write_parts
from tests.support.saved_caches import (
    JSON,
    change_json,
    read_json,
    shards_of,
    write_json,
)

Change = Callable[[Path, random.Random], None]


def some_shard(folder: Path, rng: random.Random) -> Path:
    return rng.choice(shards_of(folder))


def some_file(folder: Path, rng: random.Random) -> Path:
    return rng.choice([folder / JSON, *shards_of(folder)])


def flip(folder: Path, rng: random.Random) -> None:
    file = some_file(folder, rng)
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 20])):
        content[rng.choice([rng.randrange(len(content)), rng.randrange(min(len(content), 400))])] ^= 1 << rng.randrange(
            8
        )
    file.write_bytes(content)


def cut(folder: Path, rng: random.Random) -> None:
    file = some_file(folder, rng)
    size = file.stat().st_size
    os.truncate(file, rng.choice([0, 1, 7, 8, 9, size - 1, rng.randrange(size)]))


def lengthen(folder: Path, rng: random.Random) -> None:
    file = some_file(folder, rng)
    size = file.stat().st_size
    with file.open("ab") as opened:
        opened.write(rng.choice([b"\0", b"x" * 100, file.read_bytes()]))
    if rng.random() < 0.2:
        os.truncate(file, size + (1 << 40))  # a hole: much size, no memory


def remove(folder: Path, rng: random.Random) -> None:
    some_file(folder, rng).unlink()


def swap(folder: Path, rng: random.Random) -> None:
    first, second = rng.sample(shards_of(folder), 2)
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)


def link(folder: Path, rng: random.Random) -> None:
    file = some_file(folder, rng)
    target = folder.parent / "elsewhere"
    shutil.copy(file, target)
    file.unlink()
    file.symlink_to(rng.choice([target, Path("/dev/zero"), Path("/etc/passwd"), folder / "nothing", file]))


def no_file(folder: Path, rng: random.Random) -> None:
    file = some_file(folder, rng)
    file.unlink()
    rng.choice([os.mkdir, os.mkfifo])(file)


def overwrite(folder: Path, rng: random.Random) -> None:
    file = some_file(folder, rng)
    size = file.stat().st_size
    content = bytearray(file.read_bytes())
    begin, end = sorted(rng.randrange(size + 1) for _ in range(2))
    content[begin:end] = rng.choice([bytes(end - begin), rng.randbytes(end - begin), b"\xff" * (end - begin)])
    file.write_bytes(content)


DAMAGES: list[Change] = [flip, flip, cut, lengthen, remove, swap, link, no_file, overwrite]

VALUES: list[Any] = [
    -1, 0, 1, 2, 3, 33, 255, 4096, 65537, 1 << 31, 1 << 40, 1 << 63, 1 << 70, 1.5, -0.0, 1e308, True, False, None, "", "x",
    "../../etc/passwd", "/etc/passwd", "pages", "unused", "A" * 5000, "\0", [], [[]], {}, {"a": 1}, [0] * 50, "BF16", "I64",
    "F32", "DynamicLayer", "spin_hf saved cache", list(range(9)),
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything in a JSON value."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def mutate(content: Any, rng: random.Random) -> None:
    """Change, remove, add or double one value of a JSON object."""
    *before, last = rng.choice([path for path in places(content) if path != ("checksum",)])
    holder = content
    for key in before:
        holder = holder[key]
    kind = rng.randrange(10)
    if kind == 0:
        del holder[last]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(["more", "keys", "0", "__class__", "../x"])] = rng.choice(VALUES)
    elif kind == 1:
        holder.insert(last, rng.choice([holder[last], *VALUES]))
    elif kind < 5 and type(holder[last]) is int:
        holder[last] += rng.choice([-1, 1, 7, -holder[last] - 1, holder[last], 1 << 33])
    else:
        holder[last] = rng.choice(VALUES)


def hostile_json(folder: Path, rng: random.Random) -> None:
    content = read_json(folder)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        mutate(content, rng)
    write_json(folder, content)


def hostile_text(folder: Path, rng: random.Random) -> None:
    """JSON that parsers take differently: duplicates, constants, depth, size, other encodings."""
    text = (folder / JSON).read_text()
    (folder / JSON).write_bytes(
        rng.choice([
            text.replace('"id"', '"id": "0", "id"', 1).encode(), text.replace("false", "NaN", 1).encode(),
            ("[" * 100_000).encode(), b'{"a":' * 50_000, text.encode("utf-16"), b"\xef\xbb\xbf" + text.encode(), b"null", b"[]",
            text.encode() + b" " * (17 << 20), (text + text).encode(), text.replace("1", "1" * 5000, 1).encode(), b"\xff\xfe",
        ])
    )  # fmt: skip


def reseal(folder: Path) -> None:
    """Make sizes, digests and checksum match the files. A part is one piece here."""

    def change(content: dict[str, Any]) -> None:
        for entry in content["shards"]:
            raw = (folder / entry["name"]).read_bytes()
            length = int.from_bytes(raw[:8], "little")
            try:
                header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
                spans = [about["data_offsets"] for name, about in header.items() if name != "__metadata__"]
                digests = [piece_checksum([memoryview(body[begin:end])]) for begin, end in spans if begin != end]
            except (ValueError, TypeError, KeyError, AttributeError):
                digests = []
            entry["bytes"] = len(raw)
            entry["sha256"] = hashlib.sha256(raw[: 8 + length] + b"".join(digests)).hexdigest()

    change_json(folder, change)


def hostile_header(folder: Path, rng: random.Random) -> None:
    file = some_shard(folder, rng)
    header, data = header_and_tensors(file)
    mutate(header, rng)
    if rng.random() < 0.2:
        write_parts(file, rng.choice([b"", b"{}", b"[1]", b"{" * 9, rng.randbytes(50)]), data)
    elif rng.random() < 0.2:
        file.write_bytes((1 << rng.choice([24, 40, 63])).to_bytes(8, "little") + file.read_bytes()[8:])
    else:
        write_parts(file, header, data)
    reseal(folder)


@contextmanager
def bytes_of_tensor(file: Path, name: str) -> Iterator[bytearray]:
    """The bytes of a tensor in a shard, to be changed. The header stays as it is, byte by byte."""
    begin, end = header_and_tensors(file)[0][name]["data_offsets"]
    raw = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    content = raw[start + begin : start + end]
    yield content
    raw[start + begin : start + end] = content
    file.write_bytes(raw)


def hostile_tables(folder: Path, rng: random.Random) -> None:
    """Numbers that the cache uses as indices, or trusts: with digests that match."""
    names = ("directory", "valid", "positions", "clustered", "shifts", "partition", "tokens", "conv_states", "keys")
    found = []
    for file in shards_of(folder):
        header, _ = header_and_tensors(file)
        found += [(file, name) for name in header if any(wanted in name for wanted in names)]
    file, name = rng.choice(found)
    with bytes_of_tensor(file, name) as content:
        for _ in range(rng.choice([1, 3, 100])):
            content[rng.randrange(len(content))] = rng.choice([0, 1, 2, 127, 128, 255, rng.randrange(256)])
    reseal(folder)


HOSTILITIES: list[Change] = [hostile_json, hostile_json, hostile_json, hostile_text, hostile_header]
