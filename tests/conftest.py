"""Settings that every test needs: one thread per process, no network, quiet warnings, triton without a GPU."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if shutil.which("nvidia-smi") is None:  # before anything imports triton: without a GPU its kernels are interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

from tests.support.interpreter import quicken
from tests.support.sweeps import keep_part, mark_slow

if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
    quicken()
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)  # before pytest looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_slow(items)
    keep_part(items, os.environ.get("SPIN_HF_PART", "1/1"))
