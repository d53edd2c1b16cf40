"""The checkpoint of a distillation run: its report, and the weights with Adam's moments.

write    to a temporary file, then renamed: after an interruption the old or the new file is there
read     a damaged file raises an OptionError with a remedy
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import shown
from ..errors import OptionError

STATE, REPORT = "state.safetensors", "distill.json"

DAMAGED = (OSError, ValueError, KeyError, TypeError, RuntimeError, RecursionError, SafetensorError)
"""Exceptions that reading a damaged file may raise."""


def read_report(output: Path) -> dict[str, Any]:
    """The report of the earlier run in a folder.

    Raises:
        OptionError: it is damaged.
    """
    try:
        run = json.loads((output / REPORT).read_text())
        if not (isinstance(run, dict) and {"settings", "about", "losses", "held_out"} <= run.keys()):
            raise ValueError(f"{shown(run)} is no report")
    except DAMAGED as error:
        raise unreadable(output, REPORT, error) from error
    return run


def unreadable(output: Path, name: str, error: BaseException) -> OptionError:
    """The error for a damaged file `name` in the folder."""
    return OptionError(
        f"output: expected a run that can go on in {str(output)!r}, got a damaged {name} ({type(error).__name__}: "
        f"{shown(str(error))}); delete the folder, or pass another --output"
    )


def save_state(path: Path, parameters: dict[str, Tensor], adam: torch.optim.Adam, step: int) -> None:
    """Write weights, Adam's moments and the number of steps done."""
    tensors = {f"{name}.weights": value.detach() for name, value in parameters.items()}
    for name, value in parameters.items():
        tensors |= {f"{name}.{key}": moment for key, moment in adam.state.get(value, {}).items()}
    unfinished = path.with_name(path.name + ".part")
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, unfinished, {"step": str(step)})
    os.replace(unfinished, path)


def load_state(path: Path, parameters: dict[str, Tensor], adam: torch.optim.Adam) -> int:
    """Read a file of `save_state` into parameters and Adam, in place.

    Returns:
        the number of steps done.
    Raises:
        one of `DAMAGED`: the file is damaged.
    """
    with safe_open(path, "pt") as opened, torch.no_grad():
        step = int(opened.metadata()["step"])
        for name, value in parameters.items():
            weights = opened.get_tensor(f"{name}.weights")
            if weights.shape != value.shape:
                raise ValueError(f"{name} has shape {tuple(weights.shape)} instead of {tuple(value.shape)}")
            value.copy_(weights)
            if step:  # at step 0 Adam has no moments yet
                moments = {key: opened.get_tensor(f"{name}.{key}") for key in ("exp_avg", "exp_avg_sq", "step")}
                adam.state[value] = {key: t if key == "step" else t.to(value.device) for key, t in moments.items()}
        return step


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text)
    unfinished.replace(path)
