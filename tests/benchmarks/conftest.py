"""The benchmarks are scripts that import each other from their own folder, and triton, which exists for Linux only."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
collect_ignore_glob = [] if sys.platform == "linux" else ["test_*.py"]
