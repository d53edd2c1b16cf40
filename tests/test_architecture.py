"""The package's shape: who may import whom, who may import transformers and triton, docstrings, and the size of files.

    errors, inference_mode <- config <- kernels <- {storage | attention | integration} <- state <- {stats, transaction}
           <- {memory | indexing} <- backends <- forward_pass <- layer <- forward_log <- graph <- persistence
           <- cache <- serving <- enable <- __init__
    distill -> attention, integration and below

A module imports from its own set and from earlier ones. Imports are read from the source, so one inside a function or under
`TYPE_CHECKING` counts too. Tests, benchmarks and examples use no private attribute of a cache.
"""

from __future__ import annotations

import ast
import graphlib
import inspect
from pathlib import Path

import pytest

import spin_hf
from tests.support.cache_driver import Shape

PACKAGE = Path(spin_hf.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
OUTSIDE = sorted(
    file
    for folder in ("tests", "benchmarks", "examples")
    for file in (Path(__file__).parents[1] / folder).rglob("*.py")
    if file != Path(__file__)
)
MAX_LINES = 400

ORDER: list[set[str]] = [
    {"errors", "inference_mode"},
    {"config"},
    {"kernels"},
    {"storage", "attention", "integration"},
    {"distill"},
    {"state"},
    {"stats", "transaction"},
    {"memory", "indexing"},
    {"backends"},
    {"forward_pass"},
    {"layer"},
    {"forward_log"},
    {"graph"},
    {"persistence"},
    {"cache"},
    {"serving"},
    {"enable"},
    {"__init__"},
]
"""A module may import from its own set and from earlier ones; a new module needs a place here."""

STRANGERS = {("storage", "attention"), ("attention", "storage"), ("memory", "indexing"), ("indexing", "memory")}
MAY_IMPORT_TRANSFORMERS = {
    "cache", "layer", "enable", "forward_log", "memory.plan", "attention.interface", "attention.returned_weights",
    "backends.state_checks", "persistence.contents", "persistence.saved_caches",
}  # fmt: skip
"""Beside all of `graph`, `integration`, `serving` and `distill`."""
MOST_MODULES_AT_THE_TOP = 12
TRITON = (
    "kernels.decode.",
    "kernels.indexing.",
    "kernels.prompt.",
    "kernels.triton_launchers",
    "kernels.common",
    "kernels.compile_ahead",
    "kernels.compile_process",
    "kernels.triton_keys",
)


def name_of(file: Path) -> str:
    """`attention.interface`, `kernels.__init__`, `__init__`."""
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {name_of(file): file for file in FILES}


def imported(name: str) -> set[str]:
    """Absolute names of what a module imports: `spin_hf.kernels`, `torch.nn.functional`, ..."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
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


def own_imports(name: str) -> set[str]:
    """Modules of the package that a module imports."""
    result = set()
    for target in imported(name):
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
    assert "attention.interface" in own_imports("layer")
    assert "storage.page_table" in own_imports("state")
    assert "transformers" in third_party("attention.interface")
    assert "state" in own_imports("backends.descriptors"), "imports under TYPE_CHECKING count"


def test_few_modules_at_the_top() -> None:
    assert len([name for name in MODULES if "." not in name]) <= MOST_MODULES_AT_THE_TOP


@pytest.mark.parametrize("name", MODULES)
def test_import_direction(name: str) -> None:
    for target in own_imports(name):
        assert rank(target) <= rank(name), f"{name} imports {target}, which comes later"
        assert (name.split(".")[0], target.split(".")[0]) not in STRANGERS, f"{name} imports {target}"


def test_no_import_cycles() -> None:
    graph = {name: own_imports(name) - {name} for name in MODULES}
    tuple(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("name", MODULES)
def test_who_imports_transformers_and_triton(name: str) -> None:
    libraries = third_party(name)
    folder = name.split(".")[0]
    assert (
        "transformers" not in libraries
        or folder in ("graph", "integration", "serving", "distill")
        or name in MAY_IMPORT_TRANSFORMERS
    )
    assert "triton" not in libraries or name.startswith(TRITON)
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


def private_names() -> set[str]:
    """Private attributes and methods of a cache."""
    held = [*vars(spin_hf.SpinCache), *vars(spin_hf.SpinCache(Shape().config()))]
    return {name for name in held if name.startswith("_") and not name.startswith("__")}


def private_uses(source: str, private: set[str]) -> list[str]:
    """Private names that a source takes from other objects than `self`, also as strings (`setattr`, `patch.object`)."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in private and ast.unparse(node.value) != "self":
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.Constant) and node.value in private:
            found.append(f"line {node.lineno}: {node.value!r}")
    return found


def test_private_uses_are_found() -> None:
    private = private_names()
    assert {"_state", "_passes", "_log", "_select"} <= private
    source = "self._state\ncache._state.committed\npatch.object(runs[0].cache, '_select')\ncache.paged_layers"
    assert private_uses(source, private) == ["line 2: cache._state", "line 3: '_select'"]
    assert len(OUTSIDE) > 100


def test_no_private_attribute_of_a_cache_outside_the_package() -> None:
    """Tests read `stats()` and `tests/support/inspection.py`, benchmarks `stats()` and `benchmarks/common/inspection.py`."""
    private = private_names()
    used = {str(file): private_uses(file.read_text(encoding="utf-8"), private) for file in OUTSIDE}
    assert not {name: uses for name, uses in used.items() if uses}
