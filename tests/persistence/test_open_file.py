"""Files of saved caches are read by several threads at once, also on systems that cannot read at an offset."""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from spin_hf.persistence.files import OpenFile
from spin_hf.persistence.strict_json import RefusedError


@pytest.fixture(params=[[], ["preadv"], ["preadv", "pread"]], ids=["Linux", "macOS", "Windows"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in request.param:
        monkeypatch.delattr(os, name, raising=False)


@pytest.mark.usefixtures("system")
def test_threads_read_one_file(tmp_path: Path) -> None:
    content = random.Random(0).randbytes(1 << 20)
    (tmp_path / "file").write_bytes(content)

    def read(number: int) -> bool:
        begin = number * 7919 % (1 << 19)
        first, second = bytearray(3), bytearray(100_000)
        file.read_into([memoryview(first), memoryview(second)], begin)
        return first + second == content[begin : begin + 100_003]

    with closing(OpenFile(tmp_path / "file", "a file")) as file, ThreadPoolExecutor(8) as pool:
        assert file.size == 1 << 20
        assert all(pool.map(read, range(2000)))


@pytest.mark.usefixtures("system")
def test_a_file_that_ends_early(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"123")
    with closing(OpenFile(tmp_path / "file", "a file")) as file, pytest.raises(RefusedError, match="was it cut"):
        file.read_into([memoryview(bytearray(4))], 0)
