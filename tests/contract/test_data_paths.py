"""The paths of queries and keys that docs/decode_step.md lists function by function are those that calls take, and short."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import spin_hf
import spin_hf.kernels
from spin_hf import SpinCache
from spin_hf.storage import page_store
from tests.support.interpreted_kernels import interpret_kernels
from tests.support.zoo import build_model, random_tokens

PACKAGE = Path(spin_hf.__file__).parent
PAGE = PACKAGE.parent / "docs" / "decode_step.md"
MOST_FUNCTIONS = 10
UPDATES = 2
"""`SpinCache.update` and `SpinLayer.update`, which come before."""
_LEFT_OUT = (
    "outside_inference_mode.<locals>.outside",
    "_partial.<locals>.attend",
    "StepKernels.attend.<locals>.launches",
)
"""Wrappers without a step of their own."""


def documented(title: str) -> list[tuple[str, str]]:
    """The list behind a sentence of the page."""
    found = re.search(rf"^{re.escape(title)}.*?```\n(.*?)```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None, title
    return [(line.split()[0], line.split()[1]) for line in found[1].splitlines()]


@contextmanager
def recorded(owner: Any, name: str) -> Iterator[list[tuple[str, str]]]:
    """The functions of the package from the attention function to the last call of `owner.name`, that one included."""
    original, path = getattr(owner, name), []

    def called(*args: Any, **kwargs: Any) -> Any:
        frames = [info.frame.f_code for info in reversed(inspect.stack()[1:])]
        inside = [
            (Path(code.co_filename).relative_to(PACKAGE).as_posix(), _qualified(code))
            for code in frames
            if Path(code.co_filename).is_relative_to(PACKAGE)
        ]
        code = original.__code__
        inside.append((Path(code.co_filename).relative_to(PACKAGE).as_posix(), code.co_name))
        names = [function for _, function in inside]
        path[:] = [each for each in inside[names.index("spin_attention") :] if each[1] not in _LEFT_OUT]
        return original(*args, **kwargs)

    with patch.object(owner, name, called):
        yield path


def _qualified(code: Any) -> str:
    """The function's name with its class. Before Python 3.11 code objects do not know it: found in the sources."""
    if hasattr(code, "co_qualname"):
        return str(code.co_qualname)
    pytest.skip("needs Python 3.11")
    return ""


@torch.no_grad()
def run(owner: Any, name: str, step: bool) -> list[tuple[str, str]]:
    """The path to `owner.name` in a prompt, or in the step behind it."""
    model = build_model("llama")
    cache = SpinCache(model, "shadowkv", budget=16, recent_window=8)
    with recorded(owner, name) as path:
        model(random_tokens(1, 100), past_key_values=cache)
        if step:
            path.clear()
            model(random_tokens(1, 1), past_key_values=cache)
    return path


CASES = {
    "The query of a decode step, on a CPU": (spin_hf.kernels, "attend", True),
    "The keys of a prompt": (page_store.kernels, "put_tokens", False),
    "The queries of a prompt": (spin_hf.kernels, "fused_attention", False),
}


@pytest.mark.parametrize("title", CASES)
def test_on_a_cpu(title: str) -> None:
    path = documented(title)
    assert run(*CASES[title]) == path
    assert len(path) + UPDATES <= MOST_FUNCTIONS


def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With interpreted kernels."""
    from spin_hf.kernels.triton_launchers import launchers

    interpret_kernels(monkeypatch)
    path = documented("The query of a decode step, on a GPU")
    assert run(launchers, "attend_pages", True) == path
    assert len(path) + UPDATES <= MOST_FUNCTIONS
