"""All messages of errors and warnings in the package, read from its sources: what is formatted in is written as an ellipsis."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import spin_hf
import spin_hf.errors

PACKAGE = Path(spin_hf.__file__).parent
ERRORS = {name for name in vars(spin_hf.errors) if name.endswith("Error") and not name.startswith("_")}


def _text(node: ast.expr, constants: dict[str, ast.expr]) -> str:
    """The text of a literal, a formatted literal, their sum, or a constant of the module; "…" for all else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, constants) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, constants) + _text(node.right, constants)
    if isinstance(node, ast.Name) and node.id in constants:
        return _text(constants[node.id], constants)
    return "…"


def messages() -> Iterator[tuple[str, str, str]]:
    """File and line, the error's name or "warning", and the message, of every one that a user can meet."""
    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(file.read_text())
        constants = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ERRORS or (name == "warning" and isinstance(node.func, ast.Attribute)):
                where = f"{file.relative_to(PACKAGE.parent)}:{node.lineno}"
                yield where, name, _text(node.args[0], constants)
