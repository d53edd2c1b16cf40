"""transformers' tests are no part of this repository, nor of what PyPI has: they are run where somebody names a checkout.

    SPIN_HF_TRANSFORMERS_TESTS=/path/to/transformers/tests pytest tests/upstream

The checkout's tag is to be that of the installed version. `parameterized` has to be installed.
"""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("SPIN_HF_TRANSFORMERS_TESTS") else ["test_transformers.py"]
