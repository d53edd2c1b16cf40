"""A progress bar while Triton compiles kernels, through transformers' own bars, so that their switch serves it too."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import Future, as_completed, wait
from typing import Any

from transformers.utils import logging

DELAY_S = 2.0
"""Seconds of compiling before the bar appears. Kernels in Triton's cache are loaded in less."""


def show_compiles(compiles: Sequence[Future[Any]]) -> None:
    """Show a bar until `compiles` are done, if they take longer than `DELAY_S`.

    Returns at once where nobody would see it: stderr is neither a terminal nor a notebook, or
    `transformers.utils.logging.disable_progress_bar()` was called.
    """
    if not (logging.is_progress_bar_enabled() and _is_watched()):
        return
    done, waiting = wait(compiles, timeout=DELAY_S)
    if not waiting:
        return
    with logging.tqdm(total=len(compiles), initial=len(done), desc="Compiling GPU kernels", unit=" kernels") as bar:
        for _ in as_completed(waiting):
            bar.update()


def _is_watched() -> bool:
    """Whether stderr is a terminal or a notebook's."""
    return sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel.")
