"""The documents: every message of the package stands in docs/troubleshooting.md, examples run, links lead somewhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

import spin_hf
from spin_hf import SpinCache
from tests.support.messages import PACKAGE, messages
from tests.support.zoo import build_model

ROOT = Path(__file__).parents[1]
TROUBLES = ROOT / "docs" / "troubleshooting.md"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TITLES = {"dense layers", "torch.OutOfMemoryError"}
"""First cells of tables that are no messages."""
OF_THE_BASE_CLASS = "expected index or index_pages, got neither"
"""A NotImplementedError, which only the author of a method meets."""


def rows(heading: str | None = None) -> list[str]:
    """What stands in the first column of the tables in docs/troubleshooting.md, in one section or in all of them."""
    found, inside = [], heading is None
    for line in TROUBLES.read_text().splitlines():
        if line.startswith("## "):
            inside = heading is None or line == f"## {heading}"
        first = re.match(r"\| `([^`]+)` \|", line)
        if inside and first is not None:
            found.append(first[1])
    return found


def returned(folder: str) -> list[str]:
    """Texts that functions of these modules return, as `messages` writes them."""
    return [
        text
        for file in sorted((PACKAGE / folder).glob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Return) and node.value is not None
        for text in literals(node.value)
    ]


def literals(node: ast.AST) -> list[str]:
    """All texts in an expression, "…" for what is formatted in."""
    if isinstance(node, ast.JoinedStr):
        return ["".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)]
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    return [text for child in ast.iter_child_nodes(node) for text in literals(child)]


def test_every_message_is_explained() -> None:
    phrases = rows()
    missing = [
        f"{where}: {name}: {text}"
        for where, name, text in messages()
        if text != "…" and not any(phrase in text for phrase in phrases)
    ]
    assert not missing, f"add a row to {TROUBLES.name} for:\n" + "\n".join(missing)


def test_every_explained_message_exists() -> None:
    texts = [text for _, _, text in messages()] + [OF_THE_BASE_CLASS]
    texts += [text for name in ("graph", "integration") for file in (PACKAGE / name).glob("*.py")
              for text in literals(ast.parse(file.read_text()))]  # fmt: skip
    gone = [phrase for phrase in rows() if not any(phrase in text for text in texts) and phrase not in TITLES]
    assert not gone, f"rows of {TROUBLES.name} whose message is gone: {gone}"


def test_every_reason_to_decode_eagerly_is_explained() -> None:
    phrases = rows("Decodes eagerly")
    reasons = [text for text in returned("graph") if " " in text]
    assert len(reasons) > 10
    assert not [reason for reason in reasons if not any(phrase in reason for phrase in phrases)]


def test_the_example_method_runs() -> None:
    (text,) = re.findall(r"```python\n(.*?class MeanKey.*?)```", (ROOT / "docs" / "methods.md").read_text(), re.DOTALL)
    names: dict[str, object] = {"__name__": "example"}
    exec(compile(text, "methods.md", "exec"), names)
    method = names["MeanKey"]()  # type: ignore[operator]
    model = build_model("llama")
    ids = torch.randint(3, model.config.vocab_size, (2, 150), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 8, "do_sample": False}
    dense = model.generate(ids, past_key_values=DynamicCache(config=model.config), **options)
    whole = SpinCache(model, method, budget=1.0)
    assert torch.equal(model.generate(ids, past_key_values=whole, **options), dense)
    sparse = SpinCache(model, method, budget=16, recent_window=16)
    model.generate(ids, past_key_values=sparse, **options)
    assert 0 < sparse.stats().attended_tokens < 100


def test_what_memory_says_is_what_plan_says() -> None:
    text = (ROOT / "docs" / "memory.md").read_text()
    llama = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=131072,
    )  # fmt: skip

    def plan(method: str, batch_size: int, **options: object) -> spin_hf.MemoryPlan:
        return spin_hf.plan(
            llama, method=method, batch_size=batch_size, context_length=131072, dtype=torch.bfloat16, **options
        )

    assert f"```\n{plan('shadowkv', 4, gpu_memory='8GiB')}\n```" in text
    for method in ("shadowkv", "quest", "retroinfer", "bisection", "fitted"):
        parts = plan(method, 1).parts
        summaries, share = parts["summaries"] / 2**30, parts["summaries"] / parts["pages"]
        assert f"| `{method}` | {summaries:.1f} GiB | {100 * share:.0f} %" in text
    smallest = plan("bisection", 4, gpu_memory="8GiB").smallest_gpu_memory / 2**30
    assert f"takes {smallest:.1f} GiB at least" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page.name}: {target}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_files_and_folders_that_are_named_exist(page: Path) -> None:
    roots = (ROOT, PACKAGE, PACKAGE / "attention" / "methods", ROOT / "benchmarks")
    named = re.findall(r"`([\w/]+(?:\.py|/))`", page.read_text())
    gone = [name for name in named if not any((root / name).exists() for root in roots)]
    assert not gone


OLD_WORDS = re.compile(
    r"closer look|looks? closer|looked at|\basks?\b|regroup|rearrang|trade places|stretch|\bhome\b|make way",
    re.I,
)
"""Words that the code has left behind."""


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_documents_use_the_words_of_the_code(page: Path) -> None:
    assert not OLD_WORDS.findall(page.read_text())


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
