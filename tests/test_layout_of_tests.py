"""The shape of tests/: its folders mirror the package, helpers are in tests/support, and no file imports a test module.

tests/<folder of spin_hf>/    tests of that folder
tests/<another name>/         tests of the whole package; OTHER_FOLDERS says of what
tests/support/                everything that more than one file uses, and nothing that pytest collects
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import spin_hf

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("*.py"))
SUPPORT = TESTS / "support"
OTHER_FOLDERS = {
    "benchmarks": "the scripts in benchmarks/",
    "contract": "what users and transformers rely on, on the oldest and the newest transformers",
    "differential": "random histories against a DynamicCache, or plain tensors",
    "examples": "the scripts in examples/",
    "faults": "memory that runs out and Ctrl-C, at any place",
    "generation": "`generate` for many families of models",
    "gpu": "what needs a CUDA GPU",
    "models": "a small real model",
    "ranks": "tensor-parallel models on several processes",
    "support": "helpers",
    "upstream": "transformers' own tests",
}


def is_test(name: str) -> bool:
    """Whether a dotted name has a part that pytest collects, or that only pytest should load."""
    return any(part.startswith("test_") or part == "conftest" for part in name.split("."))


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(leading dots, dotted name) of everything that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, f"{node.module or ''}.{alias.name}") for alias in node.names)


def test_no_file_imports_a_test_module() -> None:
    found = {
        str(file.relative_to(TESTS)): name
        for file in FILES
        for dots, name in imports(file)
        if (dots or name.startswith("tests.")) and is_test(name)
    }
    found.pop("differential/__main__.py", None)  # a command: it needs the settings of tests/conftest.py
    assert not found, f"expected helpers to be imported from tests.support, got {found}; move them there"


def test_imports_are_absolute() -> None:
    found = {str(file.relative_to(TESTS)) for file in FILES for dots, _ in imports(file) if dots}
    assert not found, f"expected `from tests.support.x import y`, got relative imports in {sorted(found)}"


def test_helpers_are_in_support() -> None:
    ordinary = {"__init__.py", "__main__.py", "conftest.py"}
    strays = [
        str(file.relative_to(TESTS))
        for file in FILES
        if SUPPORT not in file.parents and file.name not in ordinary and not file.name.startswith("test_")
    ]
    assert not strays, f"expected helpers in tests/support, got {strays}; move them there"


def test_support_has_no_tests() -> None:
    strays = [
        f"{file.relative_to(TESTS)}: {node.name}"
        for file in SUPPORT.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name.startswith(("test_", "Test"))
    ]
    assert not strays, f"expected no tests in tests/support, which pytest does not collect, got {strays}"


def test_folders_mirror_the_package() -> None:
    package = Path(spin_hf.__file__).parent
    folders = {file.parent.relative_to(TESTS) for file in FILES if SUPPORT not in file.parents} - {Path()}
    strays = [str(folder) for folder in folders if not (package / folder).is_dir() and str(folder) not in OTHER_FOLDERS]
    assert not strays, f"expected folders of spin_hf or of OTHER_FOLDERS, got {strays}"
    unused = [name for name in OTHER_FOLDERS if not (TESTS / name).is_dir()]
    assert not unused, f"OTHER_FOLDERS names {unused}, which tests/ has not"
