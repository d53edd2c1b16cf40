"""MODES: name -> mode(subject) -> Trace: every way to use a cache, those of `generate` and those by hand."""

from tests.support import cache_modes, generate_modes  # noqa: F401  (they register on import)
from tests.support.runs import MODES, Mode

__all__ = ["MODES", "Mode"]
