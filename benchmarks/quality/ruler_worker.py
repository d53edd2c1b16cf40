"""Runs a generator of RULER: `python ruler_worker.py script.py --option=value ...`, in the environment of `ruler_tasks.py`.

The generator of needles divides essays into sentences with data that NLTK downloads from its own server. Here NLTK's algorithm
divides them without that data, so that prompts do not depend on a download; it decides no more than between which words of an
essay a needle can stand.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import nltk.tokenize
from nltk.tokenize.punkt import PunktSentenceTokenizer


def main() -> None:
    """Run the script as if it had been called itself."""
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    nltk.tokenize.sent_tokenize = PunktSentenceTokenizer().tokenize
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
