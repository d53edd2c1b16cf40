"""Plays single cases again and prints what they did:  python -m tests.differential 1234 [...]"""

from __future__ import annotations

import sys
import traceback

import tests.conftest  # noqa: F401  (its settings)
from tests.support.differential.run import run_case


def main(seeds: list[int]) -> int:
    """Number of cases that failed."""
    failed = 0
    for seed in seeds:
        try:
            print(run_case(seed))
        except BaseException:
            traceback.print_exc()
            failed += 1
    return failed


if __name__ == "__main__":
    sys.exit(main([int(argument) for argument in sys.argv[1:]]))
