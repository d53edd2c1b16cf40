"""The benchmarks need triton, which exists for Linux only."""

import sys

collect_ignore_glob = [] if sys.platform == "linux" else ["test_*.py"]
