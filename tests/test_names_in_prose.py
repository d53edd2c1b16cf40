"""Names in backticks, in docstrings and comments of the package, are names of something that exists.

`module.name`, `Class.method`, `name(...)`     the last part is defined, used or passed somewhere in the package or its tests
`folder/file.py`                               the file exists
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from functools import lru_cache
from pathlib import Path

import pytest

import spin_hf

PACKAGE = Path(spin_hf.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))
ELSEWHERE = {"seer_attn/decode_sparse/attn_gate_training.py", "distillation_decode.py"}
"""Files of other projects."""


def identifiers(file: Path) -> set[str]:
    """All names in the code of a file: defined, used, imported, passed by keyword; and words of its short strings."""
    found: set[str] = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                found |= set(value.split("."))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 200:
            found |= set(re.findall(r"\w+", node.value))
    return found


def prose(file: Path) -> str:
    """Docstrings, strings below attributes, and comments."""
    source = file.read_text(encoding="utf-8")
    parts = [
        node.value.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return "\n".join([*parts, *(token.string for token in tokens if token.type == tokenize.COMMENT)])


@lru_cache(maxsize=1)
def code_names() -> set[str]:
    found: set[str] = set()
    for file in [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        if file == Path(__file__):
            continue  # which names what does not exist
        found |= identifiers(file)
    return found | {file.stem for file in FILES} | {folder.name for folder in PACKAGE.rglob("*") if folder.is_dir()}


@lru_cache(maxsize=1)
def paths() -> set[str]:
    folders = [folder for folder in ROOT.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    return {path.relative_to(ROOT).as_posix() for folder in folders for path in folder.rglob("*.py")}


def missing(text: str) -> list[str]:
    """What stands in backticks in `text` and is the name of nothing."""
    found = []
    for name in re.findall(r"`([^`\n]+)`", text):
        if name.endswith(".py") and " " not in name:
            if name not in ELSEWHERE and not any(path == name or path.endswith("/" + name) for path in paths()):
                found.append(name)
            continue
        plain = re.fullmatch(r"([A-Za-z_][\w.]*)(\(.*\))?", name)
        if plain is not None and plain[1].rsplit(".", 1)[-1] not in code_names():
            found.append(name)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_what_prose_names_exists(file: Path) -> None:
    assert not missing(prose(file))


def test_the_check_sees_what_is_gone() -> None:
    text = "`kernels.group_shares` and `serialization`, as in `storage/nowhere.py`; `SpinCache.stats()`, `a + b`"
    assert missing(text) == ["kernels.group_shares", "serialization", "storage/nowhere.py"]
