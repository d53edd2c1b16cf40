"""docs/results.md and the README's tables are what the results files say, and every results file is on the page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import results_page, results_sections
from benchmarks.common.record import RESULTS
from benchmarks.results_page import command_today, page, readme, recorded
from benchmarks.results_sections import PARTS, Section, files_like, measured
from benchmarks.results_tables import losses, without, without_empty_columns


def test_the_page_is_what_the_command_writes() -> None:
    assert results_page.PAGE.read_text() == page(), "run: python -m benchmarks.results_page"


def test_the_tables_of_the_readme_are_what_the_command_writes() -> None:
    text = results_page.README.read_text()
    assert text == readme(text), "run: python -m benchmarks.results_page"
    changed = re.sub(r"(?<=\n\| 128K \| )\S+", "**0.1**", text)
    assert changed != text
    assert readme(changed) == text


def test_a_readme_without_a_mark_is_refused() -> None:
    with pytest.raises(ValueError, match="expected the marks"):
        readme(results_page.README.read_text().replace("<!-- end of ruler -->", ""))


def test_every_results_file_is_on_the_page() -> None:
    sections: list[Section] = [section for part in PARTS.values() for section in part]
    shown = {name for section in sections for name in section.files}
    assert shown == {file.relative_to(RESULTS).as_posix() for file in RESULTS.rglob("*.json")}
    figures = {section.figure for section in sections if section.figure}
    assert figures == {file.relative_to(RESULTS).as_posix() for file in RESULTS.rglob("*.svg")}


def test_commands_are_those_of_today() -> None:
    assert command_today("python benchmarks/reach.py --seconds 9") == "python -m benchmarks.memory.reach --seconds 9"
    assert command_today("python -m benchmarks.speed.decode") == "python -m benchmarks.speed.decode"
    with pytest.raises(ValueError, match="not enough values"):
        command_today("python benchmarks/gone.py")


def test_what_a_file_records_is_printed() -> None:
    result = {
        "gpu": "H100", "dtype": "bfloat16", "sources": "abc", "versions": {"python": "3", "torch": "2.11"},
        "runs": {"20261128T183658Z": {"command": "python benchmarks/reach.py"}}, "rows": [],
    }  # fmt: skip
    assert recorded("reach.json", result) == [
        "[reach.json](../benchmarks/results/reach.json): 2026-11-28, H100, bfloat16, torch 2.11, sources `abc`",
        "`python -m benchmarks.memory.reach`",
    ]


def test_columns_without_a_value_are_left_out() -> None:
    lines = ["| a | b | c |", "| --- | --- | --- |", "| 1 |  | 3 |", "|  |  | 4 |"]
    assert without_empty_columns(lines) == ["| a | c |", "| --- | --- |", "| 1 | 3 |", "|  | 4 |"]


def test_rows_of_a_method_are_left_out() -> None:
    assert without("quest", {"quest, 1/64, a": {"kl": 1.0}, "seer, 1/64, a": {"kl": 2.0}}) == {
        "seer, 1/64, a": {"kl": 2.0}
    }
    cells = {"dense": {"score": 1.0}, "quest, 1/64": {"score": 0.0}}
    assert without("quest", {"passkey, 0": cells}) == {"passkey, 0": {"dense": {"score": 1.0}}}


def test_the_readme_has_a_table_of_ruler_once_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("ruler-16k-m.json", "ruler-32k-m.json")
    cells = {name: {"score": 0.5} for name in ("fitted, 1/64", "dense", "oracle, 1/64")}
    found = {name: {"model": "m", "tokens": int(name[6:8]) << 10, "rows": {"vt, 0": cells}} for name in names}
    before = results_page.read
    monkeypatch.setattr(results_page, "files_like", lambda pattern: names)
    monkeypatch.setattr(results_page, "read", lambda name: found.get(name) or before(name))
    text = re.sub(r"<!-- ruler(.|\n)*of ruler -->\n", "", results_page.README.read_text())
    with pytest.raises(ValueError, match="ruler: benchmarks"):
        readme(text)
    marks = ["<!-- ruler: benchmarks/results_page.py -->", "<!-- end of ruler -->", ""]
    assert (
        "| m, 16K | m, 32K |\n| --- | --- | --- |\n| dense | 50.0 | 50.0 |\n| fitted, 1/64 | 50.0 | 50.0 |\n<!--"
        in readme(text + "\n".join(marks))
    )


def test_a_section_appears_with_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (results_page, results_sections):
        monkeypatch.setattr(module, "RESULTS", tmp_path)

    def found() -> list[Section]:
        return measured(Section("RULER", "Caption.", files_like("ruler-*.json"), losses()))

    assert found() == []
    cells = {"dense": {"score": 1.0}, "shadowkv, 1/16": {"score": 0.25}}
    about = {
        "model": "m",
        "tokens": 2000,
        "dtype": "float32",
        "device": "cpu",
        "new_tokens": "RULER's",
        "commands": ["run"],
    }
    (tmp_path / "h200").mkdir()
    for name in ("ruler-m.json", "h200/ruler-n.json", "records-m.json"):
        (tmp_path / name).write_text(json.dumps({**about, "rows": {"vt, 0": cells}}))
    (section,) = found()
    assert section.files == ("h200/ruler-n.json", "ruler-m.json")
    lines = results_page.written(section)
    assert lines.count("| budget | vt | mean |") == 2
    assert "| shadowkv, 1/16 | 25% | 25% |" in lines
