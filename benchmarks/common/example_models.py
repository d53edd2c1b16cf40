"""The model and the text that `examples/` uses: that folder is put on the path, as its scripts import each other by name."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from models import build_once, cache_folder, default_model, download_wheel
from texts import play

__all__ = ["build_once", "cache_folder", "default_model", "download_wheel", "play"]
