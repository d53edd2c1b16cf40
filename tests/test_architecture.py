"""The package's shape: who may import whom, who may import transformers and triton, docstrings, and the size of files.

    errors <- config <- kernels <- {storage, attention} <- {layer and its parts} <- cache <- enable <- __init__

Imports are read from the source, so one inside a function or under `TYPE_CHECKING` counts too (the latter makes no cycle).
"""

from __future__ import annotations

import ast
import graphlib
import inspect
from pathlib import Path

import pytest

import spin_hf

PACKAGE = Path(spin_hf.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400

ORDER: list[set[str]] = [
    {"errors", "lasting"},
    {"readonly"},
    {"config"},
    {"kernels"},
    {"storage", "attention"},
    {
        "step_plan",
        "layer_kinds",
        "layer_budget",
        "gpu_memory",
        "admission",
        "stats",
        "compiled",
        "undo",
        "positions",
        "inspection",
        "states",
        "shared",
        "padding",
        "attention_weights",
        "attend",
        "gradients",
        "completed",
        "selection",
        "indexing",
        "regroup",
        "descriptors",
        "decode",
        "layer",
        "forward",
        "takeover",
        "rows",
        "counting",
    },
    {"wrap", "capturable", "defer", "fixed_state", "verify", "graph", "calls"},
    {"rereading"},
    {"cache", "memory_plan"},
    {"serialization", "teacher", "released", "distill_state", "distill"},
    {"enable"},
    {"__init__"},
]
"""A module may import from its own set and from earlier ones; a new module needs a place here."""

STRANGERS = {("storage", "attention"), ("attention", "storage")}
MAY_IMPORT_TRANSFORMERS = {
    "cache",
    "calls",
    "forward",
    "layer",
    "layer_kinds",
    "memory_plan",
    "takeover",
    "enable",
    "rereading",
    "capturable",
    "defer",
    "fixed_state",
    "graph",
    "states",
    "teacher",
    "wrap",
    "distill",
    "attention.interface",
    "attention.returned_weights",
}


def name_of(file: Path) -> str:
    """`attention.interface`, `kernels.__init__`, `__init__`."""
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {name_of(file): file for file in FILES}


def for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imported(name: str, runtime_only: bool = False) -> set[str]:
    """Absolute names of what a module imports: `spin_hf.kernels`, `torch.nn.functional`, ..."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    if runtime_only:
        tree.body = [node for node in tree.body if not for_types_only(node)]
    package = ["spin_hf", *name.split(".")[:-1]]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{source}.{alias.name}" for alias in node.names}
    return found


def own_imports(name: str, runtime_only: bool = False) -> set[str]:
    """Modules of the package that a module imports."""
    result = set()
    for target in imported(name, runtime_only):
        parts = target.split(".")
        if parts[0] != "spin_hf":
            continue
        inside = parts[1:]
        candidates = [inside, inside[:-1], [*inside, "__init__"], [*inside[:-1], "__init__"]]
        (first, *_) = [".".join(c) for c in candidates if ".".join(c) in MODULES]
        result.add(first)
    return result


def third_party(name: str) -> set[str]:
    return {target.split(".")[0] for target in imported(name)} - {"spin_hf"}


def rank(name: str) -> int:
    top = name.split(".")[0]
    (position,) = [index for index, names in enumerate(ORDER) if top in names] or [None]
    assert position is not None, f"{top} has no place in ORDER"
    return position


def test_the_imports_are_really_read() -> None:
    assert len(MODULES) >= 20
    assert {"attention.interface", "storage.sequences"} <= own_imports("cache") | own_imports("layer") | own_imports(
        "step_plan"
    )
    assert "transformers" in third_party("attention.interface")
    assert own_imports("storage.chunked") == {"kernels.__init__", "errors", "lasting"} | {
        f"storage.{name}" for name in ("allocation", "host", "registration", "reserve")
    }


@pytest.mark.parametrize("name", MODULES)
def test_import_direction(name: str) -> None:
    for target in own_imports(name):
        assert rank(target) <= rank(name), f"{name} imports {target}, which comes later"
        assert (name.split(".")[0], target.split(".")[0]) not in STRANGERS, f"{name} imports {target}"


def test_no_import_cycles() -> None:
    graph = {name: own_imports(name, runtime_only=True) - {name} for name in MODULES}
    tuple(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("name", MODULES)
def test_who_imports_transformers_and_triton(name: str) -> None:
    libraries = third_party(name)
    assert "transformers" not in libraries or name in MAY_IMPORT_TRANSFORMERS
    triton_file = name.startswith("kernels.") and name not in (
        "kernels.__init__",
        "kernels.reference",
        "kernels.fields",
    )
    assert "triton" not in libraries or triton_file
    if name.split(".")[0] == "kernels":
        assert not own_imports(name) - {module for module in MODULES if module.startswith("kernels.")}, (
            "tensors and numbers only"
        )


@pytest.mark.parametrize("name", MODULES)
def test_files_say_what_they_own_and_stay_small(name: str) -> None:
    source = MODULES[name].read_text(encoding="utf-8")
    assert len((ast.get_docstring(ast.parse(source)) or "").split()) >= 5
    assert len(source.splitlines()) <= MAX_LINES


@pytest.mark.parametrize("name", sorted(set(spin_hf.__all__) - {"__version__"}))
def test_public_names_are_documented(name: str) -> None:
    """Classes and functions, and the public methods and properties that they define themselves."""
    public = getattr(spin_hf, name)
    assert public.__doc__, name
    own = vars(public) if inspect.isclass(public) else {}
    for attribute, value in own.items():
        if attribute.startswith("_") or not (
            callable(value) or isinstance(value, (property, classmethod, staticmethod))
        ):
            continue
        assert inspect.getdoc(getattr(public, attribute)), f"{name}.{attribute}"


def test_all_lists_what_is_public() -> None:
    assert list(spin_hf.__all__) == sorted(spin_hf.__all__)
    tree = ast.parse(MODULES["__init__"].read_text(encoding="utf-8"))
    names = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert names == set(spin_hf.__all__) - {"__version__"}
