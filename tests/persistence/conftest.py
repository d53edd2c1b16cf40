"""A gate in front of the threads that write prompts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from spin_hf.persistence import background_writer
from tests.support.stores import Gate


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate().patch(monkeypatch)
    yield made
    made.open()
    assert all(each.wait(60) for each in list(background_writer._writers))
