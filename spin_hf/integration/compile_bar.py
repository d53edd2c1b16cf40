"""A progress bar while Triton compiles kernels. It is one of transformers' bars, so their switch turns it off too."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import Future, as_completed, wait
from typing import Any

from transformers.utils import logging

DELAY_S = 2.0
"""Seconds of compiling before the bar appears. Loading kernels from Triton's cache takes less."""


def show_compiles(compiles: Sequence[Future[Any]]) -> None:
    """Show a bar until `compiles` are done, if they take longer than `DELAY_S`.

    Returns at once if stderr is neither a terminal nor a notebook, or after
    `transformers.utils.logging.disable_progress_bar()`.
    """
    if not (logging.is_progress_bar_enabled() and is_watched()):
        return
    done, waiting = wait(compiles, timeout=DELAY_S)
    if not waiting:
        return
    with logging.tqdm(total=len(compiles), initial=len(done), desc="Compiling GPU kernels", unit=" kernels") as bar:
        for _ in as_completed(waiting):
            bar.update()


def is_watched() -> bool:
    """Whether stderr is a terminal or belongs to a notebook."""
    return sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel.")
