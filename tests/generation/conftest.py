"""The long run is asked for: SPIN_HF_GENERATION=all pytest tests/generation."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("SPIN_HF_GENERATION") == "all" else ["test_all_ways.py"]
