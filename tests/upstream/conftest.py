"""transformers' tests are not part of this repository, nor of its PyPI package: they run where a checkout is named.

    SPIN_HF_TRANSFORMERS_TESTS=/path/to/transformers/tests pytest tests/upstream

The checkout must have the tag of the installed version. `parameterized` has to be installed.
"""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("SPIN_HF_TRANSFORMERS_TESTS") else ["test_transformers.py"]
