"""What is exchanged with kvpress's process: replies that are none are errors, and so is a process that breaks off."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import kvpress_rivals
from benchmarks.quality.kvpress_rivals import ExchangeError, ask, case, cell, parse

KEPT = {("snapkv", 64): 120, ("decoding knorm", 16): 300}
ANSWER = case("passkey, 0", [1, 2, 3], 2, KEPT, new_tokens=4, stop=[0])
FORCED = case("macbeth", [1, 2, 3], 3, KEPT, following=[4, 5], dense="dense.safetensors")
PROJECTED = {"passkey, 0": ANSWER, "macbeth": FORCED}


def _reply(**changed: Any) -> str:
    reply = {"case": "passkey, 0", "cell": "kvpress snapkv, 1/64", "attended_tokens": 120, "tokens": [5, 0], **changed}
    return json.dumps({key: value for key, value in reply.items() if value is not None})


def test_a_case_names_every_press_and_its_tokens() -> None:
    assert ANSWER["presses"] == [
        {"cell": "kvpress snapkv, 1/64", "press": "snapkv", "kept": 120},
        {"cell": "kvpress decoding knorm, 1/16", "press": "decoding knorm", "kept": 300},
    ]
    assert cell("decoding knorm", 16) == ANSWER["presses"][1]["cell"]
    assert (ANSWER["ids"], ANSWER["context"], ANSWER["stop"]) == ([1, 2, 3], 2, [0])


def test_replies_are_read() -> None:
    expected = {"attended_tokens": 120, "tokens": [5, 0]}
    assert parse(_reply(), PROJECTED) == ("passkey, 0", "kvpress snapkv, 1/64", expected)
    kl = {"kl": 0.1, "kl_p90": 0.2, "top1_agrees": 1.0}
    found = parse(_reply(case="macbeth", tokens=None, **kl), PROJECTED)
    assert found == ("macbeth", "kvpress snapkv, 1/64", {"attended_tokens": 120, **kl})


@pytest.mark.parametrize(
    "line",
    [
        "", "a warning\n", "3", '["passkey, 0"]', _reply(case="other"), _reply(cell="kvpress knorm, 1/64"),
        _reply(case=None), _reply(attended_tokens=119), _reply(tokens=None), _reply(tokens=None, kl=0.1),
        _reply(case="macbeth"), _reply(more=1),
    ],
)  # fmt: skip
def test_what_is_no_reply_is_an_error(line: str) -> None:
    with pytest.raises(ExchangeError, match="expected"):
        parse(line, PROJECTED)


def _worker(script: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script.write_text(f"import json, sys\njob = json.load(open(sys.argv[1]))\n{body}")
    monkeypatch.setattr(kvpress_rivals, "WORKER", script)
    monkeypatch.setattr(kvpress_rivals, "environment", lambda: Path(sys.executable))


def test_a_job_is_answered_reply_by_reply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = """for case in job["cases"]:
    for one in case["presses"]:
        reply = {"case": case["key"], "cell": one["cell"], "attended_tokens": one["kept"], "tokens": case["ids"]}
        print(json.dumps(reply), flush=True)
"""
    _worker(tmp_path / "worker.py", body, monkeypatch)
    found = list(ask("a model", [ANSWER]))
    assert [reply[:2] for reply in found] == [("passkey, 0", one["cell"]) for one in ANSWER["presses"]]
    assert [reply[2]["attended_tokens"] for reply in found] == [120, 300]
    assert all(reply[2]["tokens"] == [1, 2, 3] for reply in found)


def test_a_process_that_breaks_off_is_an_error_after_its_replies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _worker(tmp_path / "worker.py", f"print({_reply()!r}, flush=True)\nsys.exit(3)\n", monkeypatch)
    replies = ask("a model", [ANSWER])
    assert next(replies)[1] == "kvpress snapkv, 1/64"
    with pytest.raises(ExchangeError, match="status 3"):
        next(replies)


def test_nothing_to_ask_needs_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def unwanted() -> Path:
        raise AssertionError("the environment was asked for")

    monkeypatch.setattr(kvpress_rivals, "environment", unwanted)
    assert list(ask("a model", [])) == []
